"""The module that `fuse` returns: it runs, refuses inputs that it was not fused for, and writes itself to files."""

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
    """Run a network whose chains are single operators; `fuse` makes it and `load` reads it back.

    Attributes:
        graph_module: the graph of ATen operators that runs, a `torch.fx.GraphModule`.
        report: what `fuse` tried and chose, a `FusionReport`.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        >>> fused = fe.fuse(model, (torch.randn(2, 3, 8, 8),), measure=False)
        >>> fused(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
        >>> [str(node.target) for node in fused.graph_module.graph.nodes if node.op == "call_function"]
        ['aten.conv2d.default', 'aten.relu.default']
    """

    def __init__(self, program: ExportedProgram, report: FusionReport, guards: tuple[str, ...] = ()) -> None:
        """Run an exported program.

        Args:
            program: the network. Saving the model writes the module's present weights into it.
            report: what `fuse` tried and chose.
            guards: conditions on the sizes of the inputs, as `guards_of` returns them.
        """
        super().__init__()
        self.graph_module = inference_module(program)
        self.report = report
        self._program = program
        self._conditions = Conditions(program, guards)

    def forward(self, *inputs: Any) -> Any:
        """Run the network.

        Args:
            *inputs: the positional inputs of the original model, of the sizes and dtypes that it was fused for. The batch
                size is free, and with `dynamic_sizes` the other sizes are free too. What is no tensor must be as it was.

        Returns:
            What the original model returns.

        Raises:
            ValueError: an input has a size or a value that the model was not fused for, or sizes for which the original
                model could take another branch than the trace did.
        """
        if refusal := self._conditions.refusal(inputs):
            raise ValueError(refusal)
        return self.graph_module(*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedModel":
        """Return a copy that has weights of its own and shares the program, which is only written to when it is saved."""
        memo |= {id(shared): shared for shared in (self.report, self._program, self._conditions)}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model and its report as a `torch.export` archive without pickled objects, for `load`.

        The file is read back, compared with the model and only then put in place, so that a failure leaves an older file.

        Args:
            path: the file to write, whose name ends in `.pt2`.

        Raises:
            ValueError: the name does not end in `.pt2`, or the weights were converted after fusing.
            RuntimeError: the written file gives other outputs than the model.
        """
        serialization.write(path, self._current_program(), self.report, self._conditions.guards)

    def save_package(self, path: str | PathLike[str]) -> None:
        """Compile the model for this machine with AOTInductor and write the package, checked as in `save`.

        `torch._inductor.aoti_load_package` reads it.

        Args:
            path: the file to write.

        Raises:
            ValueError: the weights were converted after fusing.
            RuntimeError: the package gives other outputs than the model.
        """
        serialization.write_package(path, self._current_program())

    def save_onnx(self, path: str | PathLike[str]) -> None:
        """Write the model as ONNX, checked with onnxruntime as in `save`.

        Args:
            path: the file to write.

        Raises:
            ImportError: onnx, onnxscript or onnxruntime is missing.
            ValueError: the weights were converted after fusing.
            RuntimeError: the written file gives other outputs than the model.
        """
        serialization.write_onnx(path, self._current_program())

    def _current_program(self) -> ExportedProgram:
        """Return the program with the weights that the module has now; ValueError where these were converted."""
        stored = {**self._program.state_dict, **self._program.constants}
        for name, value in [*self.graph_module.named_parameters(), *self.graph_module.named_buffers()]:
            if (value.dtype, value.device) != (stored[name].dtype, stored[name].device):
                raise ValueError(
                    f"{name} was converted from {stored[name].dtype} on {stored[name].device} to {value.dtype} on "
                    f"{value.device} after fusing; convert the model and fuse it again"
                )
            stored[name].data.copy_(value.detach())
        return self._program


def make_trainable(model: FusedModel, names: Collection[str]) -> None:
    """Make parameters of the weights in `names` and of the weights of chains."""
    for name, weight in list(model.graph_module.named_buffers()):
        if name in names or name.startswith(CHAIN_PREFIX):
            path, _, own = name.rpartition(".")
            owner = model.graph_module.get_submodule(path)
            delattr(owner, own)
            owner.register_parameter(own, nn.Parameter(weight))


def load(path: str | PathLike[str]) -> FusedModel:
    """Read a model that `FusedModel.save` wrote. No code in the file is run.

    Args:
        path: the `.pt2` file.

    Returns:
        The model with its report.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no such archive, is damaged, or holds more than `save` writes.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)).eval()
        >>> fused = fe.fuse(model, (torch.randn(2, 4),), measure=False)
        >>> fused.save("model.pt2")
        >>> loaded, x = fe.load("model.pt2"), torch.randn(3, 4)
        >>> torch.equal(loaded(x), fused(x)), loaded.report == fused.report
        (True, True)
    """
    return FusedModel(*serialization.read(path))
