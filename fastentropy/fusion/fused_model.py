"""The module that `fuse` returns."""

import copy
from collections.abc import Collection
from os import PathLike
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fastentropy.fusion import serialization
from fastentropy.fusion.guards import Conditions
from fastentropy.fusion.report import FusionReport
from fastentropy.fusion.tracing import CHAIN_PREFIX, inference_module


class FusedModel(nn.Module):
    """A network for inference whose chains run as single operators; `fuse` makes it, `load` reads it back.

    report is the `FusionReport`; it prints as a table and `report.to_dict()` is JSON.
    """

    def __init__(self, program: ExportedProgram, report: FusionReport, guards: tuple[str, ...] = ()) -> None:
        """Run an exported program for inputs that meet the guards."""
        super().__init__()
        self.graph_module = inference_module(program)
        self.report = report
        self._program = program
        self._conditions = Conditions(program, guards)

    def forward(self, *inputs: Any) -> Any:
        """Run the network on the positional inputs of the original model, of the sizes that it was fused for.

        Only the batch size may differ, and every size with `dynamic_sizes`. Raises ValueError for other sizes and constants,
        and for sizes at which the model might take another way than the trace.
        """
        if refusal := self._conditions.refusal(inputs):
            raise ValueError(refusal)
        return self.graph_module(*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedModel":
        """A copy with weights of its own; the program, which nothing changes, is shared."""
        copied = type(self).__new__(type(self))
        nn.Module.__init__(copied)
        memo[id(self)] = copied
        copied.graph_module = copy.deepcopy(self.graph_module, memo)
        copied.report, copied._program, copied._conditions = self.report, self._program, self._conditions
        return copied

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model with its report as a `torch.export` archive (.pt2) without pickled objects, for `load`.

        Raises RuntimeError, and leaves an older file, where what was written gives other outputs.
        """
        serialization.write(path, self._current_program(), self.report, self._conditions.guards)

    def save_package(self, path: str | PathLike[str]) -> None:
        """Compile the model for this machine with AOTInductor and write the package, for `torch._inductor.aoti_load_package`.

        It is checked as in `save`.
        """
        serialization.write_package(path, self._current_program())

    def save_onnx(self, path: str | PathLike[str]) -> None:
        """Write the model as ONNX, checked as in `save`. Needs onnx, onnxscript and onnxruntime (ImportError)."""
        serialization.write_onnx(path, self._current_program())

    def _current_program(self) -> ExportedProgram:
        """The program with the weights that the module has now.

        Raises ValueError where these were converted.
        """
        stored = {**self._program.state_dict, **self._program.constants}
        for name, value in [*self.graph_module.named_parameters(), *self.graph_module.named_buffers()]:
            if (value.dtype, value.device) != (stored[name].dtype, stored[name].device):
                raise ValueError(
                    f"{name} was converted from {stored[name].dtype} on {stored[name].device} to {value.dtype} on "
                    f"{value.device} after fusing; convert the model and fuse it again"
                )
            stored[name].data.copy_(value.detach())
        return self._program

    def _train(self, names: Collection[str]) -> None:
        """Make parameters of the weights that were, or were made of, parameters."""
        for name, weight in list(self.graph_module.named_buffers()):
            if name in names or name.startswith(CHAIN_PREFIX):
                path, _, own = name.rpartition(".")
                owner = self.graph_module.get_submodule(path)
                delattr(owner, own)
                owner.register_parameter(own, nn.Parameter(weight))


def load(path: str | PathLike[str]) -> FusedModel:
    """Read a model that `FusedModel.save` wrote.

    Raises ValueError for a file that is not such an archive, that is damaged, or that holds more than `save` writes.
    """
    return FusedModel(*serialization.read(path))
