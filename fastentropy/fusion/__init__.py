"""Turn each linearised chain of a network into the form that runs fastest, and prove it equal.

`affine` (the algebra) -> `chains` (find) -> `plan` (choose) -> `runtime` (run, save); `lowering` writes operators into a graph.
"""

from fastentropy.fusion.api import fuse
from fastentropy.fusion.fused_model import FusedModel, load
from fastentropy.fusion.report import Candidate, ChainReport, FusionReport

__all__ = ["Candidate", "ChainReport", "FusedModel", "FusionReport", "fuse", "load"]
