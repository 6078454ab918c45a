"""Corpora as batches."""
