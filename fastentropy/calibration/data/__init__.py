"""Read a corpus of texts or images in chunks, and make batches of its documents for a model."""
