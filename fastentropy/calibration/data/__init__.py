"""Read a corpus, and make batches of it."""
