"""Measure how long each part of a network takes, and predict how long the network would take without some activations."""

from fastentropy.fusion.latency.profiler import measure_latency
from fastentropy.fusion.latency.table import LatencyTable

__all__ = ["LatencyTable", "measure_latency"]
