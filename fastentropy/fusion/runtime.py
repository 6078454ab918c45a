"""Run a pruned network with its chains fused: trace it, rewrite each chain, prove the result equal, save it and load it."""

import copy
import functools
import json
import zipfile
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from fastentropy.fusion.affine import Chain, fold, operators
from fastentropy.fusion.chains import FoundChain, find_chains
from fastentropy.fusion.lowering import lower
from fastentropy.fusion.plan import plan_chain, relative_error
from fastentropy.fusion.report import FusionReport
from fastentropy.timing import measure_times

#: The largest relative error that a fused model may have, by the dtype of its weights.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

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

    def forward(self, *inputs: Any) -> Any:
        """Run the network on the positional inputs of the original model; the batch size may differ from the example's."""
        return self.graph_module(*inputs)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a `torch.export` archive (.pt2) with the report inside. It holds no pickled object."""
        self._program.example_inputs = None
        torch.export.save(self._program, path, extra_files={"report.json": json.dumps(self.report.to_dict())})


def load(path: str | PathLike[str]) -> FusedModel:
    """Read a model that `FusedModel.save` wrote.

    Raises ValueError for a file that is not such an archive, that is damaged, or that holds a pickled object.
    """
    try:
        _refuse_pickles(path)
        extra_files = {"report.json": ""}
        program = torch.export.load(path, extra_files=extra_files)
        return FusedModel(program, FusionReport.from_dict(json.loads(extra_files["report.json"])))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a fused model (write one with fused.save(path)): {error}") from error


@torch.no_grad()
def fuse(model: nn.Module, example_inputs: Inputs, *, tolerance: float | None = None) -> FusedModel:
    """The same network with each chain of linear operators in the form that runs fastest on the example inputs.

    Batch norm is folded, and a chain becomes one operator where that is exact and measured to be faster. The result is compared
    with the model on the example inputs and on random ones, at three batch sizes where the model allows that; `tolerance` is
    the largest relative error allowed (by default 1e-5 in float32; see `TOLERANCE`). The model itself is not changed, and
    shares no memory with the result.

    example_inputs: the positional inputs of one call, batch first, of the size and on the device that matter.

    Raises ValueError where the model is in training mode, does not run on the example inputs or cannot be traced, and
    RuntimeError where the result is not equal to the model.
    """
    _check(model, example_inputs)
    original, example_inputs = copy.deepcopy(model), _clone(example_inputs)
    traced = _inference_module(_export(original, example_inputs))
    if tolerance is None:
        tolerance = TOLERANCE.get(next((p.dtype for p in model.parameters()), torch.float32), 1e-5)
    chains = [chain for chain in find_chains(traced) if len(operators(chain.elements)) > 1]
    sources = _values(traced, [chain.source for chain in chains], example_inputs)
    plans = [plan_chain(chain, sources[chain.source], tolerance) for chain in chains]
    forms = {
        "original": original,
        "folded": _rewrite(traced, chains, [fold(chain.elements) for chain in chains], sources),
        "fused": _rewrite(traced, chains, [form for form, _ in plans], sources),
    }
    times = measure_times({name: functools.partial(form, *example_inputs) for name, form in forms.items()})
    choice = min(times, key=lambda name: times[name])
    program = _export(forms[choice], example_inputs)
    error = _compare(original, _inference_module(program), _comparison_inputs(program, example_inputs))
    if not error <= tolerance:
        raise RuntimeError(
            f"the fused model differs from the original by {error:.1e} (relative), above the tolerance of {tolerance:.0e}; "
            "pass a larger tolerance= if that is acceptable"
        )
    return FusedModel(program, FusionReport(tuple(report for _, report in plans), times, choice, error))


def _check(model: nn.Module, example_inputs: Inputs) -> None:
    if not isinstance(example_inputs, tuple):
        raise ValueError(f"example_inputs must be a tuple of positional inputs, not a {type(example_inputs).__name__}: (x,)")
    if model.training:
        raise ValueError("the model is in training mode, where batch norm and dropout are not linear; call model.eval() first")
    try:
        model(*_clone(example_inputs))
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {error}") from error


def _export(model: nn.Module, example_inputs: Inputs) -> ExportedProgram:
    """Trace a model with a batch size of its own choosing, or for the batch size of the example where it has none."""
    batch = _batch_size(example_inputs)
    # torch.export takes a batch of one for a constant: trace with two.
    inputs = _with_batch_size(example_inputs, 2) if batch == 1 else example_inputs
    dynamic = pytree.tree_map(lambda value: {0: Dim.AUTO} if _has_batch(value, batch) else None, example_inputs)
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
        if batch == 1 and not _is_dynamic(program):
            program = torch.export.export(model, example_inputs)
    except Exception as error:
        raise ValueError(f"torch.export cannot trace {type(model).__name__}: {str(error).splitlines()[0]}") from error
    return program


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


def _comparison_inputs(program: ExportedProgram, example_inputs: Inputs) -> list[Inputs]:
    """The example, random values of its shape, and random values at two other batch sizes where the trace allows any."""
    inputs = [example_inputs, _random_like(example_inputs, seed=0)]
    if _is_dynamic(program):
        batch = _batch_size(example_inputs) or 0
        inputs += [_random_like(_with_batch_size(example_inputs, size), seed=size) for size in (1, batch + 1) if size != batch]
    return inputs


def _compare(original: nn.Module, fused: nn.Module, inputs: list[Inputs]) -> float:
    """The largest relative error of any output on any of the inputs."""
    errors = [0.0]
    for each in inputs:
        outputs = (pytree.tree_leaves(model(*_clone(each))) for model in (fused, original))
        errors += [relative_error(actual, expected) for actual, expected in zip(*outputs, strict=True) if _is_float(expected)]
    return max(errors)


def _is_dynamic(program: ExportedProgram) -> bool:
    return any(
        isinstance(size, torch.SymInt)
        for node in program.graph.find_nodes(op="placeholder")
        for size in getattr(node.meta.get("val"), "shape", ())
    )


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


def _refuse_pickles(path: str | PathLike[str]) -> None:
    """Raise ValueError where reading an archive would unpickle anything: such a file could run any code."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            folder, _, name = entry.filename.partition("/data/")[2].rpartition("/")
            if folder == "sample_inputs" and entry.file_size:
                raise ValueError(f"{entry.filename} holds pickled inputs")
            if name.endswith("_config.json"):
                for key, item in json.loads(archive.read(entry))["config"].items():
                    if item["use_pickle"] or not item.get("tensor_meta"):
                        raise ValueError(f"{key} is a pickled object")
