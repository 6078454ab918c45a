"""Measure the activation statistics of a model over a corpus, on any number of ranks."""
