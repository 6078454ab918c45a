"""Turn each chain of linear operators of a network into the form that runs fastest, verified against the network.

`tracing` reads the network, `chains` finds and rewrites its chains, `planner` chooses a form for each, `forms` makes the whole
networks that `api.fuse` compares, `verification` compares them, and `fused_model` runs and saves the result.
"""

from fastentropy.fusion.api import fuse
from fastentropy.fusion.fused_model import FusedModel, load
from fastentropy.fusion.report import Candidate, ChainReport, FusionReport

__all__ = ["Candidate", "ChainReport", "FusedModel", "FusionReport", "fuse", "load"]
