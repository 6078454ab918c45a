"""Linearise activations (replace them by the identity) one by one, those of lowest entropy first, as EASIER does."""

from fastentropy.pruning.api import prune
from fastentropy.pruning.result import PruningResult
from fastentropy.pruning.steps import Step

__all__ = ["PruningResult", "Step", "prune"]
