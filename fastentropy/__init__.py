"""Find the activations that a network does not need, and remove them so that the network really runs faster.

The steps are: `collect` measures `Statistics`, `prune` removes activations, and `fuse` merges what became linear into fewer
operators. README.md has an example of each.
"""

from fastentropy._utils.version import __version__ as __version__
from fastentropy.collector.api import collect
from fastentropy.collector.collector import EntropyCollector
from fastentropy.collector.exported import instrument, statistics_of
from fastentropy.collector.idle_neurons import IdleNeurons, find_idle_neurons
from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics
from fastentropy.fusion import FusedModel, FusionReport, fuse, load
from fastentropy.monitoring.monitor import EntropyMonitor
from fastentropy.monitoring.writers import json_lines_writer, tensorboard_writer, wandb_writer
from fastentropy.pruning.api import prune
from fastentropy.pruning.result import PruningResult
from fastentropy.pruning.steps import Step
from fastentropy.sites.activations import register_activation
from fastentropy.sites.finding import find_sites
from fastentropy.sites.site import Site
from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize
from fastentropy.surgery.neuron_linearization import NeuronStates, linearize_neurons
from fastentropy.surgery.neuron_replacement import ReplacedNeurons
from fastentropy.surgery.neuronwise import NeuronwiseActivation

__all__ = [
    "EntropyCollector",
    "EntropyMonitor",
    "FusedModel",
    "FusionReport",
    "IdleNeurons",
    "NeuronStates",
    "NeuronwiseActivation",
    "PruningResult",
    "ReplacedNeurons",
    "Site",
    "SiteStatistics",
    "Statistics",
    "Step",
    "collect",
    "find_idle_neurons",
    "find_sites",
    "fuse",
    "instrument",
    "isolate",
    "json_lines_writer",
    "linearize",
    "linearize_neurons",
    "load",
    "prune",
    "register_activation",
    "statistics_of",
    "tensorboard_writer",
    "wandb_writer",
]
