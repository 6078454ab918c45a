"""How long each part of a network takes, and how long it would take without its activations."""

from fastentropy.fusion.latency.profiler import measure_latency
from fastentropy.fusion.latency.table import LatencyTable

__all__ = ["LatencyTable", "measure_latency"]
