"""Run a pruned network with its chains fused: trace it, rewrite each chain, prove the result equal, save it and load it."""

import copy
import functools
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastentropy.fusion import archive
from fastentropy.fusion.chains import FoundChain, find_chains, overwritten_constants
from fastentropy.fusion.elements import operators
from fastentropy.fusion.inputs import Inputs, batch_size, clone
from fastentropy.fusion.merging import fold
from fastentropy.fusion.plan import plan_chain
from fastentropy.fusion.proof import Proof
from fastentropy.fusion.report import ChainReport, FusionReport
from fastentropy.fusion.tracing import (
    export,
    first_line,
    fits,
    in_channels_last,
    inference_module,
    input_sizes,
    rewrite,
    values_of,
)
from fastentropy.timing import measure_times

#: The largest relative error that a fused model may have, by the dtype of its weights.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class FusedModel(nn.Module):
    """A network for inference whose chains run as single operators; `fuse` makes it, `load` reads it back.

    report is the `FusionReport`; it prints as a table and `report.to_dict()` is JSON.
    """

    def __init__(self, program: ExportedProgram, report: FusionReport) -> None:
        """Run an exported program."""
        super().__init__()
        self.graph_module = inference_module(program)
        self.report = report
        self._program = program
        self._sizes = input_sizes(program)

    def forward(self, *inputs: Any) -> Any:
        """Run the network on the positional inputs of the original model, of the sizes that it was fused for.

        Only the batch size may differ. Raises ValueError for another size: the chains are exact for the sizes of the example.
        """
        values = pytree.tree_leaves(inputs)
        if len(values) != len(self._sizes):
            raise ValueError(f"this model was fused for {len(self._sizes)} inputs, but is called with {len(values)}")
        for value, sizes in zip(values, self._sizes, strict=True):
            if not fits(value, sizes):
                wanted = [low if high == low + 1 else "batch" for low, high in sizes or ()]
                raise ValueError(
                    f"an input has shape {list(value.shape)}, but this model was fused for {wanted}; fuse it again"
                )
        return self.graph_module(*inputs)

    def takes(self, inputs: Inputs) -> bool:
        """Whether the sizes of the inputs are among those that the model was fused for."""
        values = pytree.tree_leaves(inputs)
        return len(values) == len(self._sizes) and all(map(fits, values, self._sizes))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model as `fuse` made it, with its report, as a `torch.export` archive (.pt2) without pickled objects."""
        archive.write(path, self._program, self.report)


def load(path: str | PathLike[str]) -> FusedModel:
    """Read a model that `FusedModel.save` wrote.

    Raises ValueError for a file that is not such an archive, that is damaged, or that holds more than `save` writes.
    """
    return FusedModel(*archive.read(path))


@torch.no_grad()
def fuse(model: nn.Module, example_inputs: Inputs, *, tolerance: float | None = None, measure: bool = True) -> FusedModel:
    """The same network with each chain of linear operators in the form that runs fastest on the example inputs.

    Batch norm is folded, and a chain becomes one operator where that is exact and measured to be faster. The result is compared
    with the model on the example inputs and on random ones, at three batch sizes where the model allows that; `tolerance` is
    the largest relative error allowed (by default 1e-5 in float32; see `TOLERANCE`). The model itself is not changed, and
    shares no memory with the result.

    example_inputs: the positional inputs of one call, batch first, of the size and on the device that matter.
    measure: choose by measured times; otherwise by counted multiplications and bytes, for another machine than this one.

    Raises ValueError where the model is in training mode, does not run on the example inputs, cannot be traced or updates
    buffers as it runs, and RuntimeError where even its trace does not compute what it computes.
    """
    original = _check(model, example_inputs)
    program = export(original, example_inputs)
    traced = inference_module(program)
    if updated := overwritten_constants(traced):
        raise ValueError(f"the model updates {', '.join(updated)} as it runs: its outputs do not depend on its inputs alone")
    if tolerance is None:
        tolerance = TOLERANCE.get(next((p.dtype for p in model.parameters()), torch.float32), 1e-5)
    chains = [chain for chain in find_chains(traced) if len(operators(chain.elements)) > 1]
    forms, reports = _forms(original, traced, chains, example_inputs, tolerance, measure)
    times = _times(forms, example_inputs) if measure else {}
    order = sorted(times, key=lambda form: times[form]) or [(name, "contiguous") for name in ("fused", "folded", "original")]
    best = {name: next(form for form in order if form[0] == name) for name in ("original", "folded", "fused")}
    takes = FusedModel(program, FusionReport((), {}, {}, "original", 0.0)).takes
    proof = Proof(original, example_inputs, takes, tolerance)
    for choice in sorted(best, key=lambda name: order.index(best[name])):
        memory_formats = {name: form[1] for name, form in best.items()}
        milliseconds = {name: times[form] for name, form in best.items()} if measure else {}
        report = FusionReport(reports[best["fused"][1]], milliseconds, memory_formats, choice, 0.0)
        fused = FusedModel(export(forms[best[choice]], example_inputs), report)
        error = proof.error(fused)
        if error <= tolerance:
            fused.report = FusionReport(report.chains, milliseconds, memory_formats, choice, error)
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
    if batch_size(example_inputs) == 0:
        raise ValueError("example_inputs hold a batch of no samples; give at least one")
    original = copy.deepcopy(model)
    try:
        original(*clone(example_inputs))
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {first_line(error)}") from error
    return original


def _forms(
    original: nn.Module,
    traced: GraphModule,
    chains: list[FoundChain],
    example_inputs: Inputs,
    tolerance: float,
    measure: bool,
) -> tuple[dict[tuple[str, str], nn.Module], dict[str, tuple[ChainReport, ...]]]:
    """The model as given, folded and fused, in each memory format, and the reports on its chains in each.

    Everybody gets the memory format in which they are fastest, so that no gain is claimed that a user had for free.
    """
    forms: dict[tuple[str, str], nn.Module] = {}
    reports: dict[str, tuple[ChainReport, ...]] = {}
    channels_last = in_channels_last(traced) if measure else None
    for name, graph in {"contiguous": traced, "channels_last": channels_last}.items():
        if graph is None:
            continue
        try:
            sources = values_of(graph, [chain.source for chain in chains], clone(example_inputs))
        except RuntimeError:  # a view that was traced on contiguous values
            if name == "contiguous":
                raise
            continue
        plans = [plan_chain(chain, sources[chain.source], tolerance, measure=measure) for chain in chains]
        reports[name] = tuple(report for _, report in plans)
        forms["original", name] = original if name == "contiguous" else _channels_last(original)
        forms["folded", name] = rewrite(graph, chains, [fold(chain.elements) for chain in chains], sources)
        forms["fused", name] = rewrite(graph, chains, [form for form, _ in plans], sources)
    return forms, reports


def _channels_last(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.ndim in (4, 5):
            last = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=last)
    return copied


def _times(forms: dict[tuple[str, str], nn.Module], example_inputs: Inputs) -> dict[tuple[str, str], float]:
    inputs = clone(example_inputs)
    return measure_times({name: functools.partial(form, *inputs) for name, form in forms.items()})
