"""Remove the activations of lowest entropy one by one, as EASIER does."""

from fastentropy.pruning.api import PruningResult, prune
from fastentropy.pruning.steps import Step

__all__ = ["PruningResult", "Step", "prune"]
