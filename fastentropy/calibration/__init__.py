"""Measure the activation statistics of a model over a corpus of texts or images, on any number of ranks (processes)."""
