"""Find the call sites of activations in a model."""

from fastentropy.sites.activations import register_activation
from fastentropy.sites.site import Site
from fastentropy.sites.watcher import find_sites

__all__ = ["Site", "find_sites", "register_activation"]
