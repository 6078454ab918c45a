"""Run a pruned network with its chains fused: trace it, rewrite each chain, prove the result equal, save it and load it."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fastentropy._utils.errors import one_line
from fastentropy._utils.timing import measure_times
from fastentropy.fusion.chains.elements import Chain, operators
from fastentropy.fusion.chains.finding import FoundChain, find_chains, overwritten_constants
from fastentropy.fusion.chains.merging import Borders
from fastentropy.fusion.fused_model import FusedModel
from fastentropy.fusion.guards import Conditions, guards_of
from fastentropy.fusion.inputs import Inputs, batch_size, clone
from fastentropy.fusion.memory_format import with_channels_last_weights
from fastentropy.fusion.planner import plan_chain
from fastentropy.fusion.report import ChainReport, FusionReport
from fastentropy.fusion.tracing import (
    export,
    free_axes,
    in_channels_last,
    inference_module,
    own_constants,
    rewrite,
    values_of,
)
from fastentropy.fusion.verification import TOLERANCE, EquivalenceCheck

#: One of original, folded and fused, and a memory format.
_Form = tuple[str, str]


@torch.inference_mode(False)
@torch.no_grad()
def fuse(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    tolerance: float | None = None,
    measure: bool = True,
    dynamic_sizes: bool = False,
    borders: Borders = "exact",
) -> FusedModel:
    """The same network with each chain of linear operators in the form that runs fastest on the example inputs.

    Batch norm is folded, and a chain becomes one operator where that is measured to be faster; near a border what one
    operator would get wrong is mended. The result is compared with the model on the example inputs and on random ones, at
    three batch sizes where the model allows that. The model itself is not changed, and shares no memory with the result.

    Args:
        model: any module in eval mode that `torch.export` can trace.
        example_inputs: the positional inputs of one call, batch first, of the size and on the device that matter.
        tolerance: the largest relative error allowed, by default 1e-5 in float32; see `TOLERANCE`.
        measure: choose by measured times; otherwise by counted multiplications and bytes, for another machine than this one.
        dynamic_sizes: leave the sizes of images and sequences free too, where the model allows that; fewer chains merge then.
        borders: "train" moves all zero padding to the front of each chain that is merged. Outputs near the border are others
            then, as the report says, and the result has parameters, to be trained afterwards.

    Raises:
        ValueError: the model is in training mode, does not run on the example inputs, cannot be traced or updates buffers as
            it runs.
        RuntimeError: even its trace does not compute what it computes.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise ValueError(f"tolerance must be a relative error from 0 on, not {tolerance!r}")
    if borders not in get_args(Borders):
        raise ValueError(f"borders must be 'exact' or 'train', not {borders!r}")
    original = _check(model, example_inputs)
    program = own_constants(export(original, example_inputs, dynamic_sizes))
    traced = inference_module(program)
    if updated := overwritten_constants(traced):
        raise ValueError(f"the model updates {', '.join(updated)} as it runs: its outputs do not depend on its inputs alone")
    tolerance = _tolerance(model) if tolerance is None else tolerance
    guards = guards_of(program, original, example_inputs)
    conditions = Conditions(program, guards)
    check = EquivalenceCheck(original, example_inputs, lambda inputs: not conditions.refusal(inputs), tolerance)
    guards += _smallest_sizes(program, check, traced, example_inputs)
    plan = functools.partial(plan_chain, tolerance=tolerance, measure=measure, borders=borders, merged={})

    def is_equal(form: nn.Module) -> bool:
        return borders == "train" or check.error(form) <= tolerance

    forms, reports = _forms(original, traced, example_inputs, plan, is_equal, measure)
    times = _times(forms, example_inputs) if measure else {}
    best = _best(forms, times)
    names = ("original", "folded", "fused")
    memory_formats = {name: best[name][1] for name in names}
    milliseconds = {name: times[best[name]] for name in names} if measure else {}
    for choice, form in best.items():
        exported = own_constants(export(forms[form], example_inputs, dynamic_sizes))
        fused = FusedModel(exported, FusionReport((), {}, {}, choice, 0.0), guards)
        error = check.error(fused)
        differs_at_borders = borders == "train" and choice == "fused"
        if error <= tolerance or (differs_at_borders and check.error(forms[best["folded"]]) <= tolerance):
            fused.report = FusionReport(reports[best["fused"][1]], milliseconds, memory_formats, choice, error)
            if borders == "train":
                fused._train(dict(original.named_parameters()))
            return fused
    raise RuntimeError(
        f"the trace of the model differs from the model by {error:.1e} (relative), above the tolerance of {tolerance:.0e}; "
        "pass a larger tolerance= if that is acceptable"
    )


def _tolerance(model: nn.Module) -> float:
    """That of the dtype which most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    dtype = max(sizes, key=lambda each: sizes[each], default=torch.float32)
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])


def _smallest_sizes(
    program: ExportedProgram, check: EquivalenceCheck, traced: nn.Module, example_inputs: Inputs
) -> tuple[str, ...]:
    """Guards for free sizes of 1: a trace, made at larger sizes, holds for a batch of one where it is compared on it."""
    takes_one = check.holds_for_one(traced)
    if not takes_one and batch_size(example_inputs) != 1:
        check.leave_out_one()
    least = 1 if takes_one else 2
    return tuple(f"leaf_{leaf}.size()[{axis}] >= {2 if axis else least}" for leaf, axis in free_axes(program))


def _best(forms: Mapping[_Form, nn.Module], times: Mapping[_Form, float]) -> dict[str, _Form]:
    """Each of fused, folded and original in its fastest memory format, the fastest first."""
    order = sorted(times, key=lambda form: times[form]) if times else list(forms)[::-1]
    best: dict[str, _Form] = {}
    for form in order:
        best.setdefault(form[0], form)
    return best


def _check(model: nn.Module, example_inputs: Inputs) -> nn.Module:
    """A copy of the model that has run on the example inputs."""
    if not isinstance(example_inputs, tuple):
        raise ValueError(f"example_inputs must be a tuple of positional inputs, not a {type(example_inputs).__name__}: (x,)")
    if model.training:
        raise ValueError("the model is in training mode, where batch norm and dropout are not linear; call model.eval() first")
    if batch_size(example_inputs) == 0:
        raise ValueError("example_inputs hold a batch of no samples; give at least one")
    try:
        original = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied by copy.deepcopy: {one_line(error)}") from error
    try:
        original(*clone(example_inputs))
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {one_line(error)}") from error
    return original


def _forms(
    original: nn.Module,
    traced: GraphModule,
    example_inputs: Inputs,
    plan: Callable[[FoundChain, Tensor], tuple[Chain, ChainReport]],
    is_equal: Callable[[nn.Module], bool],
    measure: bool,
) -> tuple[dict[_Form, nn.Module], dict[str, tuple[ChainReport, ...]]]:
    """The model as given, folded and fused, in each memory format, and the reports on its chains in each.

    Everybody gets the memory format in which they are fastest, so that no gain is claimed that a user had for free.
    """
    chains = [chain for chain in find_chains(traced) if len(operators(chain.elements)) > 1]
    forms: dict[_Form, nn.Module] = {}
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
        plans = [plan(chain, sources[chain.source]) for chain in chains]
        chosen = dict(zip(chains, plans, strict=True))
        fused, equal = rewrite(graph, chains, [form for form, _ in plans], sources), chains
        if not is_equal(fused):
            equal = _equal_chains(graph, chains, plans, sources, is_equal)
            fused = rewrite(graph, equal, [chosen[chain][0] for chain in equal], sources)
        reports[name] = tuple(chosen[chain][1] if chain in equal else _left(chosen[chain][1]) for chain in chains)
        forms["original", name] = original if name == "contiguous" else with_channels_last_weights(original)
        forms["folded", name] = rewrite(graph, equal, [chain.folded for chain in equal], sources)
        forms["fused", name] = fused
    return forms, reports


def _equal_chains(
    graph: GraphModule,
    chains: list[FoundChain],
    plans: list[tuple[Chain, ChainReport]],
    sources: Mapping[Node, Tensor],
    is_equal: Callable[[nn.Module], bool],
) -> list[FoundChain]:
    """The chains that may be rewritten, each by itself, without another result of the whole model."""
    pairs = zip(chains, plans, strict=True)
    return [chain for chain, (form, _) in pairs if is_equal(rewrite(graph, [chain], [form], sources))]


def _left(report: ChainReport) -> ChainReport:
    return dataclasses.replace(report, choice="keep", note="left as it was: rewritten, it changes the outputs of the model")


def _times(forms: Mapping[_Form, nn.Module], example_inputs: Inputs) -> dict[_Form, float]:
    inputs = clone(example_inputs)
    return measure_times({name: functools.partial(form, *inputs) for name, form in forms.items()})
