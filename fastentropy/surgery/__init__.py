"""Change a model: give each call of an activation its own module, and put the identity in the place of some."""

from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize

__all__ = ["isolate", "linearize"]
