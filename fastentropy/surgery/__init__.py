"""Change a model: give each call of an activation a module of its own, or replace activations by the identity."""

from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize

__all__ = ["isolate", "linearize"]
