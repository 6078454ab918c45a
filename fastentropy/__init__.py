"""Find the layers that a network does not need, at the speed of inference, and take them out so that it really runs faster.

collect -> Statistics -> prune -> fuse. See README.md for an example of each.
"""

from fastentropy.collector.collector import EntropyCollector, collect
from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics
from fastentropy.fusion import FusedModel, FusionReport, fuse, load
from fastentropy.pruning.api import PruningResult, prune
from fastentropy.pruning.steps import Step
from fastentropy.sites.activations import register_activation
from fastentropy.sites.finding import find_sites
from fastentropy.sites.site import Site
from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize

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
