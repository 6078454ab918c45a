"""Define the module that `fuse` returns. It runs the fused network, checks its inputs and writes itself to files."""

import copy
from collections.abc import Collection
from os import PathLike
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fastentropy.fusion import serialization
from fastentropy.fusion.binding import Binding, Signature
from fastentropy.fusion.guards import Conditions
from fastentropy.fusion.report import FusionReport
from fastentropy.fusion.tracing import CHAIN_PREFIX, inference_module
from fastentropy.sites.inputs import described


class FusedModel(nn.Module):
    """Run a network whose chains (stretches of linear operators) have the form that `fuse` chose.

    `fuse` makes it, and `load` reads it from a file.

    Attributes:
        graph_module: the graph of ATen operators that runs, a `torch.fx.GraphModule`.
        report: the `FusionReport` on what `fuse` tried and chose.

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

    def __init__(
        self, program: ExportedProgram, report: FusionReport, guards: tuple[str, ...] = (), signature: Signature | None = None
    ) -> None:
        """Make the module from an exported program.

        Args:
            program: the fused network. Saving the module first writes its present weights into the program.
            report: the report on what `fuse` tried and chose.
            guards: conditions on the sizes of the inputs, as `guards_of` returns them.
            signature: the parameters of the original model. Without it, positional inputs cannot be given by name, nor the
                reverse.
        """
        super().__init__()
        self.graph_module = inference_module(program)
        self.report = report
        self._program = program
        self._conditions = Conditions(program, guards)
        self._binding = Binding(program, signature or Signature())
        self.eval()

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the network.

        Args:
            *inputs: the positional inputs of the original model, with the sizes and dtypes of the example inputs of `fuse`.
                The batch size is free; with `dynamic_sizes`, the other sizes are free too. An input that is not a tensor must
                equal the one in the example inputs.
            **keywords: the keyword inputs, likewise. An input may be given by its position or by its name, as in a call of the
                original model.

        Returns:
            The outputs of the original model.

        Raises:
            ValueError: an input is missing, or is not among the example inputs; an input has a size or a value that the model
                was not fused for, or a size for which the original model might take another branch than it took when it was
                traced.
        """
        inputs, keywords, leaves = self._binding.bind(inputs, keywords)
        if refusal := self._conditions.refusal(leaves):
            raise ValueError(refusal)
        return self.graph_module(*inputs, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedModel":
        """Return a copy with its own weights.

        The exported program is shared. It is only written to when a model is saved.
        """
        memo |= {id(shared): shared for shared in (self.report, self._program, self._conditions, self._binding)}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model and its report to a file that `load` reads: a `torch.export` archive without pickled objects.

        The file is written under another name, read back and compared with the model. Only then it replaces an older file.

        Args:
            path: the file to write. Its name must end in `.pt2`.

        Raises:
            ValueError: the name does not end in `.pt2`, or the weights were converted to another dtype or device after fusing.
            RuntimeError: the written model gives other outputs than this one.
        """
        serialization.write(path, self._current_program(), self.report, self._conditions.guards, self._binding.signature)

    def save_package(self, path: str | PathLike[str]) -> None:
        """Compile the model for this machine with AOTInductor and write the package, checked as in `save`.

        `torch._inductor.aoti_load_package` reads the package.

        Args:
            path: the file to write.

        Raises:
            ValueError: the weights were converted to another dtype or device after fusing.
            RuntimeError: the package gives other outputs than the model.
        """
        serialization.write_package(path, self._current_program())

    def save_onnx(self, path: str | PathLike[str]) -> None:
        """Write the model as ONNX, checked with onnxruntime as in `save`.

        Args:
            path: the file to write.

        Raises:
            ImportError: onnx, onnxscript or onnxruntime is missing.
            ValueError: the weights were converted to another dtype or device after fusing.
            RuntimeError: the written file gives other outputs than the model.
        """
        serialization.write_onnx(path, self._current_program())

    def _current_program(self) -> ExportedProgram:
        """Return the exported program with the present weights of the module.

        Raises ValueError if a weight was converted to another dtype or device.
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


def make_trainable(model: FusedModel, names: Collection[str]) -> None:
    """Turn weights of a fused model, which are buffers, into parameters.

    Args:
        model: the fused model, which is changed.
        names: names of the buffers that become parameters, in addition to the weights of all rewritten chains.
    """
    for name, weight in list(model.graph_module.named_buffers()):
        if name in names or name.startswith(CHAIN_PREFIX):
            path, _, own = name.rpartition(".")
            owner = model.graph_module.get_submodule(path)
            delattr(owner, own)
            owner.register_parameter(own, nn.Parameter(weight))


def load(path: str | PathLike[str]) -> FusedModel:
    """Read a model that `FusedModel.save` wrote, without running code from the file.

    Args:
        path: the `.pt2` file.

    Returns:
        The model with its report.

    Raises:
        TypeError: `path` is not the name of a file.
        OSError: the file cannot be read.
        ValueError: the file is not such an archive, is damaged, or holds an entry that `save` does not write.

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
    if not (isinstance(path, str | PathLike) or hasattr(path, "read")):
        raise TypeError(f"path: got {described(path)}, expected the name of a .pt2 file that fused.save wrote")
    return FusedModel(*serialization.read(path))
