"""Turn each linearised chain of a network into the form that runs fastest, and prove it equal.

`affine` (the algebra) -> `chains` (find) -> `plan` (choose) -> `runtime` (run, save); `lowering` writes operators into a graph.
"""

from fastentropy.fusion.report import Candidate, ChainReport, FusionReport
from fastentropy.fusion.runtime import FusedModel, fuse, load

__all__ = ["Candidate", "ChainReport", "FusedModel", "FusionReport", "fuse", "load"]
