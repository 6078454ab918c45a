"""Count, for each neuron, how often an activation's input is off (below 0), zero and on (above 0) while a model runs."""

from fastentropy.collector.api import collect
from fastentropy.collector.collector import EntropyCollector
from fastentropy.collector.idle_neurons import IdleNeurons, find_idle_neurons
from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics

__all__ = ["EntropyCollector", "IdleNeurons", "SiteStatistics", "Statistics", "collect", "find_idle_neurons"]
