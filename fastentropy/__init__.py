"""Find the layers that a network does not need, at the speed of inference, and take them out so that it really runs faster.

collect -> Statistics -> prune -> fuse. See README.md for an example of each.
"""

from fastentropy.activations import register_activation
from fastentropy.collector import EntropyCollector, collect
from fastentropy.fusion import FusedModel, FusionReport, fuse, load
from fastentropy.isolation import isolate
from fastentropy.linearization import linearize
from fastentropy.pruning import PruningResult, prune
from fastentropy.sites import Site, find_sites
from fastentropy.statistics import SiteStatistics, Statistics
from fastentropy.steps import Step

__all__ = [
    "EntropyCollector",
    "FusedModel",
    "FusionReport",
    "PruningResult",
    "Site",
    "SiteStatistics",
    "Statistics",
    "Step",
    "collect",
    "find_sites",
    "fuse",
    "isolate",
    "linearize",
    "load",
    "prune",
    "register_activation",
]
