"""Activations that count the states of their input."""
