"""The time of each part of a network, and of what its parts become without activations."""

from fastentropy.fusion.latency.profiler import measure_latency
from fastentropy.fusion.latency.table import LatencyTable

__all__ = ["LatencyTable", "measure_latency"]
