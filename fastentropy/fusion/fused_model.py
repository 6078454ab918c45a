"""Define the module that `fuse` returns. It runs the fused network, checks its inputs and writes itself to files."""

import copy
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fastentropy.fusion import serialization
from fastentropy.fusion.backends import make_runner
from fastentropy.fusion.binding import Binding, Signature
from fastentropy.fusion.chains.constants import PARAMETER_PREFIX
from fastentropy.fusion.guards import Conditions
from fastentropy.fusion.report import FusionReport
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import CHAIN_PREFIX, export_again, inference_module
from fastentropy.sites.inputs import described


class FusedModel(nn.Module):
    """Run a network whose chains (stretches of linear operators) have the form that `fuse` chose.

    `fuse` makes it, and `load` reads it from a file. It is always in eval mode. Where no other form was faster, it runs a copy
    of the user's own model.

    Attributes:
        network: the network: a graph of ATen operators, or a copy of the user's model.
        report: the `FusionReport` on what `fuse` tried and chose.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        >>> fused = fe.fuse(model, (torch.randn(2, 3, 8, 8),), measure=False)
        >>> fused(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
        >>> [str(node.target) for node in fused.graph_module.graph.nodes if node.op == "call_function"]
        ['aten.conv2d.default', 'aten.relu_.default']
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: TracedInputs,
        report: FusionReport,
        guards: tuple[str, ...] = (),
        signature: Signature | None = None,
    ) -> None:
        """Make the module.

        Args:
            network: the graph that runs, or the user's model itself, which runs without checks of its inputs.
            inputs: the inputs with which the model was traced.
            report: the report on what `fuse` tried and chose. It names the backend that runs the network.
            guards: conditions on the sizes of the inputs, as `guards_of` returns them.
            signature: the parameters of the original model. Without it, positional inputs cannot be given by name, nor the
                reverse.
        """
        super().__init__()
        self.network = network
        self.report = report
        self._inputs = inputs
        self._conditions = Conditions(inputs, guards)
        self._binding = Binding(inputs, signature or Signature())
        self._placements = {name: (value.dtype, value.device) for name, value in self._tensors()}
        self._runner: Callable[..., Any] | None = None
        network.eval()
        self.training = False

    @property
    def graph_module(self) -> GraphModule:
        """Return the network as a graph of ATen operators. Where the user's model runs, the graph is traced from it."""
        return self.network if isinstance(self.network, GraphModule) else inference_module(self._program())

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the network.

        Args:
            *inputs: the positional inputs of the original model, with the sizes and dtypes of the example inputs of `fuse`.
                The batch size is free; with `dynamic_sizes`, the other sizes are free too. An input that is not a tensor must
                equal the one in the example inputs. Where the user's model runs, it takes whatever it takes.
            **keywords: the keyword inputs, likewise. An input may be given by its position or by its name, as in a call of the
                original model.

        Returns:
            The outputs of the original model.

        Raises:
            ValueError: an input is missing, or is not among the example inputs; an input has a size or a value that the model
                was not fused for, or a size for which the original model might take another branch than it took when it was
                traced.
        """
        run = self._runner or self._start()
        if self._runs_the_model:
            return run(*inputs, **keywords)
        inputs, keywords, leaves = self._binding.bind(inputs, keywords)
        if refusal := self._conditions.refusal(leaves):
            raise ValueError(refusal)
        return run(*inputs, **keywords)

    def train(self, mode: bool = True) -> "FusedModel":
        """Do nothing: the model stays in eval mode, because chains are linear in eval mode only.

        Args:
            mode: has no effect.

        Returns:
            The model.
        """
        return self

    def _apply(self, *given: Any, **options: Any) -> "FusedModel":
        """Convert the weights, as `to`, `double` and `cuda` do, and start the backend anew if that changed them."""
        before = [value.data_ptr() for _, value in self._tensors()]
        try:
            super()._apply(*given, **options)  # type: ignore[no-untyped-call]
        finally:
            if [value.data_ptr() for _, value in self._tensors()] != before:
                object.__setattr__(self, "_runner", None)
        return self

    def _load_from_state_dict(self, *given: Any, **options: Any) -> None:
        """Refuse other weights where the present ones are part of compiled code; `load_state_dict` calls this."""
        if self._runner is not None and self.report.backend != "eager":
            raise ValueError(
                f"the weights are compiled into this model, which runs in {self.report.backend}, and cannot be replaced; load "
                "them into the original model and fuse that again"
            )
        super()._load_from_state_dict(*given, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedModel":
        """Return a copy with its own weights."""
        memo |= {id(shared): shared for shared in (self.report, self._inputs, self._conditions, self._binding)}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy({**self.__dict__, "_runner": None}, memo))
        return copied

    def __reduce__(self) -> tuple[Callable[[bytes], "FusedModel"], tuple[bytes]]:
        """Pickle the model as the archive that `save` writes."""
        archive = io.BytesIO()
        serialization.write_archive(archive, self._program(), self.report, self._conditions.guards, self._binding.signature)
        return _from_archive, (archive.getvalue(),)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model and its report to a file that `load` reads: a `torch.export` archive without pickled objects.

        The file is written under another name, read back and compared with the model. Only then it replaces an older file.

        Args:
            path: the file to write. Its name must end in `.pt2`.

        Raises:
            TypeError: `path` is not the name of a file.
            ValueError: the name does not end in `.pt2`, or the weights were converted to another dtype or device after fusing.
            RuntimeError: the written model gives other outputs than this one.
        """
        _check_path(path, "a .pt2 file to write")
        serialization.write(path, self._program(), self.report, self._conditions.guards, self._binding.signature)

    def save_package(self, path: str | PathLike[str]) -> None:
        """Compile the model for this machine with AOTInductor and write the package, checked as in `save`.

        `torch._inductor.aoti_load_package` reads the package.

        Args:
            path: the file to write.

        Raises:
            TypeError: `path` is not the name of a file.
            ValueError: the weights were converted to another dtype or device after fusing.
            RuntimeError: the package gives other outputs than the model.
        """
        _check_path(path, "a .pt2 package to write")
        serialization.write_package(path, self._program())

    def save_onnx(
        self, path: str | PathLike[str], *, input_names: Sequence[str] = (), output_names: Sequence[str] = ()
    ) -> None:
        """Write the model as ONNX, checked with onnxruntime as in `save`.

        Args:
            path: the file to write.
            input_names: the names of the inputs in the file, one for each tensor of the example inputs, in their order. If
                empty, they are called as the parameters of the model's `forward`.
            output_names: the names of the outputs in the file, in their order. If empty, they are called after the operators
                that compute them.

        Raises:
            TypeError: `path` is not the name of a file, or the names are no list of texts.
            ImportError: onnx, onnxscript or onnxruntime is missing.
            ValueError: the weights were converted to another dtype or device after fusing, or the names are not as many as the
                inputs or outputs, or not all different.
            RuntimeError: the written file gives other outputs than the model.
        """
        _check_path(path, "an .onnx file to write")
        for argument, names in (("input_names", input_names), ("output_names", output_names)):
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"{argument}: got {names!r}, expected a list of names: {argument}=['x']")
        serialization.write_onnx(path, self._program(), input_names, output_names)

    @property
    def _runs_the_model(self) -> bool:
        """Return whether the user's model itself runs, and not a graph."""
        return self.report.backend == "eager" and not isinstance(self.network, GraphModule)

    def _start(self) -> Callable[..., Any]:
        """Return what runs the network, and keep it for later calls."""
        if self.report.backend == "onnxruntime":
            self._check_placements()
        runner = make_runner(self.report.backend, self.network, self._inputs)
        object.__setattr__(self, "_runner", runner)  # nn.Module would list the network a second time, as a submodule
        return runner

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of the weights and buffers."""
        yield from self.network.named_parameters()
        yield from self.network.named_buffers()

    def _program(self) -> ExportedProgram:
        """Export the network with its present weights, none of which may have been converted."""
        self._check_placements()
        with torch.no_grad():
            return export_again(self.network, self._inputs)

    def _check_placements(self) -> None:
        """Raise ValueError if a weight was converted to another dtype or device, since the trace is of the former ones."""
        for name, value in self._tensors():
            dtype, device = self._placements[name]
            if (value.dtype, value.device) != (dtype, device):
                raise ValueError(
                    f"{name} was converted from {dtype} on {device} to {value.dtype} on {value.device} after fusing; convert "
                    "the model and fuse it again"
                )


def make_trainable(model: FusedModel, names: Collection[str]) -> None:
    """Turn weights of a fused model, which are buffers, into parameters.

    Args:
        model: the fused model, which is changed.
        names: names of the buffers that become parameters, in addition to the weights of all rewritten chains and
            to those that were computed from parameters.
    """
    for name, weight in list(model.network.named_buffers()):
        if name in names or name.startswith((CHAIN_PREFIX, PARAMETER_PREFIX)):
            path, _, own = name.rpartition(".")
            owner = model.network.get_submodule(path)
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
    if not hasattr(path, "read"):
        _check_path(path, "a .pt2 file that fused.save wrote")
    return _from_archive(path)


def _check_path(path: object, expected: str) -> None:
    """Raise TypeError if a path is not the name of a file."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path: got {described(path)}, expected the name of {expected}")


def _from_archive(source: str | PathLike[str] | bytes) -> FusedModel:
    """Return the model in an archive, given as a file or as its bytes."""
    program, report, guards, signature = serialization.read(source)
    return FusedModel(inference_module(program), TracedInputs.of(program), report, guards, signature)
