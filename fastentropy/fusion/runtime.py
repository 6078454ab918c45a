"""Run a pruned network with its chains fused: trace it, rewrite each chain, prove the result equal, save it and load it."""

import copy
import functools
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from fastentropy.files import replace_file
from fastentropy.fusion.affine import Chain, fold, operators
from fastentropy.fusion.chains import FoundChain, find_chains, overwritten_constants
from fastentropy.fusion.lowering import lower
from fastentropy.fusion.plan import plan_chain, relative_error
from fastentropy.fusion.report import FusionReport
from fastentropy.timing import measure_times

#: The largest relative error that a fused model may have, by the dtype of its weights.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: The entries of an archive that `FusedModel.save` writes, below its folder.
_OWN_ENTRIES = re.compile(
    r"models/model\.json|extra/report\.json|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)"
)

Inputs = tuple[Any, ...]


class FusedModel(nn.Module):
    """A network for inference whose chains run as single operators; `fuse` makes it, `load` reads it back.

    report is the `FusionReport`; it prints as a table and `report.to_dict()` is JSON.
    """

    def __init__(self, program: ExportedProgram, report: FusionReport) -> None:
        """Run an exported program."""
        super().__init__()
        self.graph_module = _inference_module(program)
        self.report = report
        self._program = program
        self._shapes = _input_shapes(program)

    def forward(self, *inputs: Any) -> Any:
        """Run the network on the positional inputs of the original model, of the sizes that it was fused for.

        Only the batch size may differ. Raises ValueError for another size: the chains are exact for the sizes of the example.
        """
        values = pytree.tree_leaves(inputs)
        if len(values) != len(self._shapes):
            raise ValueError(f"this model was fused for {len(self._shapes)} inputs, but is called with {len(values)}")
        for value, shape in zip(values, self._shapes, strict=True):
            if shape is not None and not _fits(value.shape, shape):
                wanted = [size.start if len(size) == 1 else "batch" for size in shape]
                raise ValueError(
                    f"an input has shape {list(value.shape)}, but this model was fused for {wanted}; fuse it again"
                )
        return self.graph_module(*inputs)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model as `fuse` made it, with its report, as a `torch.export` archive (.pt2) without pickled objects."""
        report = json.dumps(self.report.to_dict())
        self._program.example_inputs = None
        replace_file(path, lambda file: torch.export.save(self._program, file, extra_files={"report.json": report}))


def load(path: str | PathLike[str]) -> FusedModel:
    """Read a model that `FusedModel.save` wrote.

    Raises ValueError for a file that is not such an archive, that is damaged, or that holds more than `save` writes.
    """
    try:
        _refuse_foreign_entries(path)
        extra_files = {"report.json": ""}
        program = torch.export.load(path, extra_files=extra_files)
        return FusedModel(program, FusionReport.from_dict(json.loads(extra_files["report.json"])))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a fused model (write one with fused.save(path)): {_first_line(error)}") from error


@torch.no_grad()
def fuse(model: nn.Module, example_inputs: Inputs, *, tolerance: float | None = None) -> FusedModel:
    """The same network with each chain of linear operators in the form that runs fastest on the example inputs.

    Batch norm is folded, and a chain becomes one operator where that is exact and measured to be faster. The result is compared
    with the model on the example inputs and on random ones, at three batch sizes where the model allows that; `tolerance` is
    the largest relative error allowed (by default 1e-5 in float32; see `TOLERANCE`). The model itself is not changed, and
    shares no memory with the result.

    example_inputs: the positional inputs of one call, batch first, of the size and on the device that matter.

    Raises ValueError where the model is in training mode, does not run on the example inputs, cannot be traced or updates
    buffers as it runs, and RuntimeError where even its trace does not compute what it computes.
    """
    original = _check(model, example_inputs)
    program = _export(original, example_inputs)
    traced = _inference_module(program)
    if updated := overwritten_constants(traced):
        raise ValueError(f"the model updates {', '.join(updated)} as it runs: its outputs do not depend on its inputs alone")
    if tolerance is None:
        tolerance = TOLERANCE.get(next((p.dtype for p in model.parameters()), torch.float32), 1e-5)
    chains = [chain for chain in find_chains(traced) if len(operators(chain.elements)) > 1]
    sources = _values(traced, [chain.source for chain in chains], _clone(example_inputs))
    plans = [plan_chain(chain, sources[chain.source], tolerance) for chain in chains]
    forms = {
        "original": original,
        "folded": _rewrite(traced, chains, [fold(chain.elements) for chain in chains], sources),
        "fused": _rewrite(traced, chains, [form for form, _ in plans], sources),
    }
    inputs = _clone(example_inputs)
    times = measure_times({name: functools.partial(form, *inputs) for name, form in forms.items()})
    reports = tuple(report for _, report in plans)
    for choice in sorted(times, key=lambda name: times[name]):
        exported = _export(forms[choice], example_inputs)
        fused = FusedModel(exported, FusionReport(reports, times, choice, 0.0))
        error = _compare(original, fused, example_inputs)
        if error <= tolerance:
            fused.report = FusionReport(reports, times, choice, error)
            return fused
    raise RuntimeError(
        f"the trace of the model differs from the model by {error:.1e} (relative), above the tolerance of {tolerance:.0e}; "
        "pass a larger tolerance= if that is acceptable"
    )


def _check(model: nn.Module, example_inputs: Inputs) -> nn.Module:
    """A copy of the model that has run on the example inputs."""
    if not isinstance(example_inputs, tuple):
        raise ValueError(f"example_inputs must be a tuple of positional inputs, not a {type(example_inputs).__name__}: (x,)")
    if model.training:
        raise ValueError("the model is in training mode, where batch norm and dropout are not linear; call model.eval() first")
    if _batch_size(example_inputs) == 0:
        raise ValueError("example_inputs hold a batch of no samples; give at least one")
    original = copy.deepcopy(model)
    try:
        original(*_clone(example_inputs))
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {_first_line(error)}") from error
    return original


def _export(model: nn.Module, example_inputs: Inputs) -> ExportedProgram:
    """Trace a model with a free batch size, or for that of the example where the model does not allow another."""
    inputs = _clone(example_inputs)
    try:
        program = _trace_single(model, inputs) if _batch_size(inputs) == 1 else _trace(model, inputs)
    except Exception as error:
        raise ValueError(f"torch.export cannot trace {type(model).__name__}: {_first_line(error)}") from error
    return program


def _trace(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    shapes, batch = ShapesCollection(), _batch_size(inputs)  # type: ignore[no-untyped-call]
    for value in pytree.tree_leaves(inputs):
        if _has_batch(value, batch):
            shapes[value] = {0: Dim.AUTO}
    return torch.export.export(model, inputs, dynamic_shapes=shapes)


def _trace_single(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Trace for a batch of one: with two, since torch.export takes a one for a constant, and with one where that fails."""
    try:
        program = _trace(model, _with_batch_size(inputs, 2))
        if _is_dynamic(program):
            return program
    except Exception:  # whatever a model raises for another batch size
        pass
    return torch.export.export(model, inputs)


def _inference_module(program: ExportedProgram) -> GraphModule:
    """The graph of a program with its constants as buffers, and without the checks of its input shapes."""
    module = program.module(check_guards=False)
    return _with_constants(module, module.graph, {})


def _with_constants(module: nn.Module, graph: Graph, added: Mapping[str, Tensor]) -> GraphModule:
    """A module that owns only the constants which the graph reads."""
    graph.eliminate_dead_code()
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - set(added)
    constants: dict[str, Any] = {name: _attribute(module, name) for name in names}
    detached = {name: v.detach() if isinstance(v, Tensor) else v for name, v in constants.items()}
    return GraphModule({**detached, **added}, graph)


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _rewrite(traced: GraphModule, chains: list[FoundChain], forms: list[Chain], sources: Mapping[Node, Tensor]) -> GraphModule:
    """The same graph with each chain in another form, in the dtype and on the device of its source's value."""
    graph = copy.deepcopy(traced.graph)
    copies = {node.name: node for node in graph.nodes}
    constants: dict[str, Tensor] = {}
    for index, (chain, form) in enumerate(zip(chains, forms, strict=True)):
        end = copies[chain.end.name]
        with graph.inserting_before(end):
            source = copies[chain.source.name]
            result = lower(form, graph, source, constants, sources[chain.source], f"chain_{index}")
        end.replace_all_uses_with(result)
        for node in reversed(chain.members):
            graph.erase_node(copies[node.name])
        copies[chain.end.name] = result  # the next chain may begin here
    return _with_constants(traced, graph, constants)


class _Recorder(Interpreter):
    """Runs a graph and keeps the values of some of its nodes."""

    def __init__(self, module: GraphModule, nodes: Iterable[Node]) -> None:
        super().__init__(module)
        self.values: dict[Node, Tensor] = {}
        self._nodes = set(nodes)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            self.values[n] = value
        return value


def _values(traced: GraphModule, nodes: Iterable[Node], inputs: Inputs) -> dict[Node, Tensor]:
    recorder = _Recorder(traced, nodes)
    recorder.run(*pytree.tree_leaves(inputs), enable_io_processing=False)
    return recorder.values


def _compare(original: nn.Module, fused: FusedModel, example_inputs: Inputs) -> float:
    """The largest relative error of any output: on the example, on random values, and at two other batch sizes."""
    batch = _batch_size(example_inputs) or 0
    inputs = [example_inputs, _random_like(example_inputs, seed=0)]
    for size in {1, batch + 1} - {batch}:
        other = _random_like(_with_batch_size(example_inputs, size), seed=size)
        if _fits_all(other, fused._shapes) and _runs(original, other):
            inputs.append(other)
    return max(_error(original, fused, each) for each in inputs)


def _error(original: nn.Module, fused: FusedModel, inputs: Inputs) -> float:
    actual, expected = (pytree.tree_leaves(model(*_clone(inputs))) for model in (fused, original))
    pairs = [pair for pair in zip(actual, expected, strict=True) if _is_float(pair[1])]
    return max((relative_error(*pair) for pair in pairs), default=0.0)


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        model(*_clone(inputs))
    except Exception:  # whatever a model raises for a size that it does not take
        return False
    return True


def _input_shapes(program: ExportedProgram) -> list[tuple[range, ...] | None]:
    """The sizes that each input may have, as ranges; None for what is not a tensor."""
    specs = program.graph_signature.input_specs
    placeholders = zip(specs, program.graph.find_nodes(op="placeholder"), strict=True)
    return [_sizes(node.meta.get("val"), program) for spec, node in placeholders if spec.kind is InputKind.USER_INPUT]


def _sizes(value: Any, program: ExportedProgram) -> tuple[range, ...] | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(_allowed(size, program) for size in value.shape)


def _allowed(size: int | torch.SymInt, program: ExportedProgram) -> range:
    if (constant := _constant(size)) is not None:
        return range(constant, constant + 1)
    assert isinstance(size, torch.SymInt)
    bounds = program.range_constraints.get(size.node.expr)
    lowest, highest = (int(bounds.lower), bounds.upper) if bounds else (0, None)
    limit = int(highest) + 1 if highest is not None and highest < sys.maxsize else sys.maxsize
    # A trace has sizes from 2 on; a batch of one runs as well, and is compared.
    return range(0 if lowest <= 2 else lowest, limit)


def _fits(shape: Sequence[int], allowed: tuple[range, ...]) -> bool:
    return len(shape) == len(allowed) and all(size in sizes for size, sizes in zip(shape, allowed, strict=True))


def _fits_all(inputs: Inputs, shapes: list[tuple[range, ...] | None]) -> bool:
    leaves = pytree.tree_leaves(inputs)
    return all(shape is None or _fits(value.shape, shape) for value, shape in zip(leaves, shapes, strict=True))


def _is_dynamic(program: ExportedProgram) -> bool:
    return any(
        _constant(size) is None
        for node in program.graph.find_nodes(op="placeholder")
        for size in getattr(node.meta.get("val"), "shape", ())
    )


def _constant(size: int | torch.SymInt) -> int | None:
    """A size that a trace fixed, though it may still be written as a symbol; None for a free one."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _batch_size(inputs: Inputs) -> int | None:
    """The first size of the first tensor."""
    tensors = (value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor) and value.ndim)
    return next((tensor.shape[0] for tensor in tensors), None)


def _has_batch(value: Any, batch: int | None) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def _with_batch_size(inputs: Inputs, size: int) -> Inputs:
    """The inputs with their batch repeated, and cut to another size."""
    batch = _batch_size(inputs)

    def resize(value: Any) -> Any:
        if not _has_batch(value, batch):
            return value
        return value.repeat(-(-size // value.shape[0]), *(1,) * (value.ndim - 1))[:size].contiguous()

    return tuple(pytree.tree_map(resize, inputs))


def _random_like(inputs: Inputs, seed: int) -> Inputs:
    """The inputs with normal random values in place of every floating tensor."""
    generator = torch.Generator().manual_seed(seed)

    def randomize(value: Any) -> Any:
        if not _is_float(value):
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return tuple(pytree.tree_map(randomize, inputs))


def _clone(inputs: Inputs) -> Inputs:
    """Inputs of their own for a model that may write over them."""
    return tuple(pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _refuse_foreign_entries(path: str | PathLike[str]) -> None:
    """Raise ValueError where an archive holds anything but what `save` writes: reading a pickle can run any code."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]
            empty_sample_inputs = name == "data/sample_inputs/model.pt" and not entry.file_size
            if not (_OWN_ENTRIES.fullmatch(name) or empty_sample_inputs):
                raise ValueError(f"{entry.filename} is not part of a fused model and may hold a pickle")
            if name.endswith("_config.json"):
                for key, item in json.loads(archive.read(entry))["config"].items():
                    if item["use_pickle"] or not item.get("tensor_meta"):
                        raise ValueError(f"{key} is a pickled object")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
