"""Rewrite each chain (stretch of linear operators) of a network into its fastest form, and verify the result.

A form is one way to compute the same function: with batch norm folded, as one merged operator, or as fused kernels, for
example. `tracing` traces the network. `neurons` cuts out what is constant in it, and `path_choice` leads linear neurons past
their activation. `chains` finds and rewrites its chains. `planner` chooses a form for each chain. `forms` makes the whole
networks, and `finishing` makes them run as fast as their operators allow. `choosing` times each in each of the `backends`, and
takes the fastest whose outputs `verification` finds equal to those of the network. `fused_model` runs and saves the result.
"""

from fastentropy.fusion.api import fuse
from fastentropy.fusion.fused_model import FusedModel, load
from fastentropy.fusion.report import Candidate, ChainReport, FusionReport

__all__ = ["Candidate", "ChainReport", "FusedModel", "FusionReport", "fuse", "load"]
