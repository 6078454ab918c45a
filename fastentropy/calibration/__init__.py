"""Activation statistics of a model over a corpus, on any number of ranks."""
