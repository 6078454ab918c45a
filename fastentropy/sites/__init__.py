"""Find the call sites of activations in a model."""

from fastentropy.sites.activations import register_activation
from fastentropy.sites.finding import find_sites
from fastentropy.sites.site import Site

__all__ = ["Site", "find_sites", "register_activation"]
