"""Change a model: give each call of an activation its own module, and replace some by the identity."""

from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize

__all__ = ["isolate", "linearize"]
