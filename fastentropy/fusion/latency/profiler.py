"""Measure what the parts of a network take, and what each stretch would take without its activations."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._utils.timing import measure_times
from fastentropy.fusion.api import fuse
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import Activation, Chain, Element, Flatten, Sum, spatial_size
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import composed_shape, merge, placeholder_weights, with_tap_bias
from fastentropy.fusion.chains.passes import fold, fuse_pairs
from fastentropy.fusion.inputs import Inputs, clone
from fastentropy.fusion.latency.table import LatencyTable, Part, Section, Stretch, without_slow_approximations
from fastentropy.fusion.planner import TIE, calls, promising_stops, sketch
from fastentropy.fusion.projection import central_kernel, replaceable_modules
from fastentropy.fusion.tracing import export, in_channels_last, inference_module, values_of
from fastentropy.sites.interception import replace_activation

#: Activations that may be run in place again and again: they do not change what they gave. Others would end in zeros.
_IDEMPOTENT = (nn.ReLU, nn.Hardtanh)


class _Marker(nn.Module):
    """Stands for an activation in a trace."""

    def forward(self, x: Tensor) -> Tensor:
        # What torch.ops has is not annotated.
        return torch.ops.aten.alias.default(x)  # type: ignore[no-any-return]


@torch.inference_mode(False)
@torch.no_grad()
def measure_latency(
    model: nn.Module, example_inputs: Inputs, sites: Sequence[str], *, approximate: bool = False
) -> LatencyTable:
    """Time a model in eval mode, its parts, and the stretches that become one operator without the activations of sites.

    Everything is in the memory format in which the dense model runs fastest. With `approximate`, also what `projection` would
    make of a stretch, where that is faster than what is exact.
    Raises ValueError where `fuse` does, and for a site that the trace does not show.
    """
    report = fuse(model, example_inputs).report
    fastest = report.milliseconds[report.choice]
    marked = copy.deepcopy(model)
    activations = {name: _repeatable(marked.get_submodule(name)) for name in sites}
    for name in sites:
        replace_activation(marked, name, _Marker())
    traced = inference_module(export(marked, example_inputs))
    if report.memory_formats[report.choice] == "channels_last":
        traced = in_channels_last(traced) or traced
    chains = find_chains(traced, activations)
    sources = values_of(traced, [chain.source for chain in chains], clone(example_inputs))
    profile = _Profile(replaceable_modules(model, traced) if approximate else set())
    sections = [profile.section(chain.folded, sources[chain.source])[0] for chain in chains]
    table = LatencyTable.from_parts(report.milliseconds["original"], fastest, sections)
    if hidden := [name for name in sites if name not in table.sites]:
        raise ValueError(
            f"{', '.join(hidden)}: activations that torch.export does not show as calls of their modules, as with "
            "module.forward(x); call the modules themselves, or judge by another criterion than latency"
        )
    return table


def _repeatable(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    if getattr(copied, "inplace", False) and not isinstance(copied, _IDEMPOTENT):
        # Attributes of a Module are annotated as tensors and modules.
        copied.inplace = False  # type: ignore[assignment]
    return copied


class _Profile:
    """Makes the sections of a model, with approximations of series of modules that may be replaced."""

    def __init__(self, replaceable: set[str]) -> None:
        self._replaceable = replaceable

    def section(self, chain: Chain, x: Tensor) -> tuple[Section, Tensor]:
        """The section of a chain that is applied to x, and its output."""
        inputs, branches = [x], {}
        for index, element in enumerate(chain):
            if isinstance(element, Sum):
                sections, outputs = zip(*(self.section(branch, inputs[-1].clone()) for branch in element.branches), strict=True)
                branches[index] = sections
                inputs.append(sum(outputs[1:], outputs[0]))
            else:
                inputs.append(compile_chain((element,), inputs[-1])(inputs[-1].clone()))
        forms = {index: (_itself(element),) for index, element in enumerate(chain)}
        times = _times(forms, {index: inputs[index + (index in branches)] for index in forms})
        parts = tuple(
            Part(times[index], element.name if isinstance(element, Activation) else "", branches.get(index, ()))
            for index, element in enumerate(chain)
        )
        return without_slow_approximations(Section(parts, tuple(self._stretches(chain, inputs))), TIE), inputs[-1]

    def _stretches(self, chain: Chain, inputs: Sequence[Tensor]) -> Iterator[Stretch]:
        """Each stretch that may stand as one operator, timed against those that begin at the same place.

        All at once would need memory for every merged weight of a network.
        """
        places = [index for index, element in enumerate(chain) if not isinstance(element, Activation | Flatten)]
        linear = tuple(_linearized(chain[index]) for index in places)
        sketches = [sketch(element) for element in linear]
        for first, start in enumerate(places):
            x, ends = inputs[start], [place + 1 for place in places[first:]]
            forms = {
                (ends[count - 1], kind): form
                for count in promising_stops(linear[first:], sketches[first:], x)
                if count > 1 or isinstance(linear[first], Sum)
                for kind, form in _merged(fold(linear[first : first + count]), x)
            }
            for count, stop in enumerate(ends[1:] if self._replaceable else (), 2):
                if form := self._projected(chain[start:stop], linear[first : first + count]):
                    forms[stop, "projected"] = form
            for (stop, kind), time in _times(forms, dict.fromkeys(forms, x)).items():
                modules = _modules(chain[start:stop]) if kind == "projected" else ()
                yield Stretch(start, stop, time, _sites(chain[start:stop]), modules)

    def _projected(self, chain: Chain, linear: Chain) -> "Chain | None":
        """The convolution that would approximate a series of modules; None where there is none."""
        names = set(_modules(chain))
        if not names or not names - _sites(chain) <= self._replaceable:
            return None
        try:
            smaller = central_kernel(linear, placeholder_weights)
        except ValueError:
            return None
        return None if smaller.kernel == composed_shape(linear).kernel else (smaller,)


def _merged(chain: Chain, x: Tensor) -> Iterator[tuple[str, Chain]]:
    """The forms in which a linearised stretch may run as one, by kind; their weights are only good for timing."""
    with contextlib.suppress(ValueError):
        yield "merged", merge(chain, spatial_size(chain, x), composed=placeholder_weights)
    if x.is_cuda:
        with contextlib.suppress(ValueError):
            yield "masked", (with_tap_bias(chain),)
        yield "kernels", fuse_pairs(chain)


def _times(forms: Mapping[Any, Chain], inputs: Mapping[Any, Tensor]) -> dict[Any, float]:
    gpu = next((x.device for x in inputs.values() if x.is_cuda), None)
    return measure_times(calls(forms, inputs), rounds=11, round_seconds=0.001, graphs_on=gpu)


def _itself(element: Element) -> Element:
    """What stands for an element as it is; of branches, their addition."""
    return Sum(((),) * len(element.branches)) if isinstance(element, Sum) else element


def _linearized(element: Element) -> Element:
    """An element without the activations in its branches."""
    if not isinstance(element, Sum):
        return element
    branches = (tuple(_linearized(each) for each in branch if not isinstance(each, Activation)) for branch in element.branches)
    return Sum(tuple(map(fold, branches)))


def _sites(chain: Chain) -> frozenset[str]:
    names: set[str] = set()
    for element in chain:
        if isinstance(element, Activation):
            names.add(element.name)
        elif isinstance(element, Sum):
            names.update(*map(_sites, element.branches))
    return frozenset(names)


def _modules(chain: Chain) -> tuple[str, ...]:
    """The paths of the modules that a series of elements stands for; empty where one of them is more than modules."""
    names: list[str] = []
    for element in chain:
        if isinstance(element, Activation):
            names.append(element.name)
        elif isinstance(element, AffineOperator) and element.names:
            names += element.names
        else:
            return ()
    return tuple(names) if len(set(names)) == len(names) else ()
