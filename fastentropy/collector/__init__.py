"""Count, per neuron, the states of the activations of a model while it runs."""

from fastentropy.collector.collector import EntropyCollector, collect
from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics

__all__ = ["EntropyCollector", "SiteStatistics", "Statistics", "collect"]
