"""Measure how long the parts of a network take, and how long series of parts take as one operator without activations.

A site is a call of an activation. A chain is a stretch of linear operators; here it continues through the activations of the
given sites, which may be removed. The table calls a measured chain a section, the elements of the chain parts, and a series of
parts that can run as one operator a stretch (see `table`).
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._utils.timing import measure_times
from fastentropy.fusion.api import fuse
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import Activation, Chain, Concatenation, Element, Flatten, Parallel, spatial_size
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import composed_shape, merge, placeholder_weights, with_tap_bias
from fastentropy.fusion.chains.passes import fold, fuse_pairs
from fastentropy.fusion.inputs import Inputs, clone
from fastentropy.fusion.latency.table import LatencyTable, Part, Section, Stretch, without_slow_approximations
from fastentropy.fusion.planner import TIE, promising_stops, sketch
from fastentropy.fusion.pricing import calls
from fastentropy.fusion.projection import central_kernel, replaceable_modules
from fastentropy.fusion.tracing import export, in_channels_last, prepared_module, values_of
from fastentropy.sites.fast_paths import replace_activation
from fastentropy.sites.inputs import ExampleInputs, check_inputs, check_model, site_names

#: Activations that may be timed in place, because applying them to their own output changes nothing. Other activations would
#: change the input of each further repetition.
_IDEMPOTENT = (nn.ReLU, nn.Hardtanh)


class _ActivationMarker(nn.Module):
    """A stand-in for an activation in a trace. It leaves an `aten.alias` node, by which `find_chains` finds the activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        # The operators of torch.ops are not annotated.
        return torch.ops.aten.alias.default(x)  # type: ignore[no-any-return]


@torch.inference_mode(False)
@torch.no_grad()
def measure_latency(
    model: nn.Module, example_inputs: ExampleInputs, sites: Sequence[str], *, approximate: bool = False
) -> LatencyTable:
    """Time a model, its parts, and the series of parts that can become one operator when some activations are removed.

    All parts are timed in the memory format of the form of the model that `fuse` chooses.

    Args:
        model: a model in eval mode, which is not changed.
        example_inputs: a tuple of the positional inputs of one call, or a mapping of its keyword inputs, in the sizes and on
            the device to measure for.
        sites: names of the sites (calls of an activation) whose activations may be removed.
        approximate: also time, for each series of convolutions, the smaller convolution by which `projection` would
            approximate it. It is put into the table if it is faster than the exact operators.

    Returns:
        The table of times, in milliseconds.

    Raises:
        TypeError: an argument is of another kind, such as a single tensor in place of a tuple.
        ValueError: `fuse` rejects the model, a site has no module, or the activation of a site does not appear in the trace.

    Examples:
        >>> import torch
        >>> from fastentropy.fusion.latency import measure_latency
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> table = measure_latency(model, (torch.randn(2, 4),), ["1"])
        >>> table.sites
        {'1'}
    """
    check_model(model)
    given = check_inputs(example_inputs, "measure_latency(model, {}, sites)")
    sites = site_names(sites, "sites")
    if missing := set(sites) - dict(model.named_modules()).keys():
        raise ValueError(f"sites: the model has no module {min(missing)!r}; name activation modules, as fe.find_sites does")
    report = fuse(model, given).report
    fastest = report.milliseconds[report.choice]
    marked = copy.deepcopy(model)
    activations = {name: _repeatable(marked.get_submodule(name)) for name in sites}
    inputs = Inputs.of(given)
    copied = clone(inputs)
    inputs = inputs.with_batch_of(marked(*copied.args, **copied.kwargs))
    for name in sites:
        replace_activation(marked, name, _ActivationMarker())
    traced = prepared_module(export(marked, inputs))
    if report.memory_formats[report.choice] == "channels_last":
        traced = in_channels_last(traced) or traced
    chains = find_chains(traced, activations)
    sources = values_of(traced, [chain.source for chain in chains], clone(inputs))
    profiler = _Profiler(replaceable_modules(model, traced) if approximate else set())
    sections = [profiler.section(chain.folded, sources[chain.source])[0] for chain in chains]
    table = LatencyTable.from_parts(report.milliseconds["original"], fastest, sections)
    if hidden := [name for name in sites if name not in table.sites]:
        raise ValueError(
            f"{', '.join(hidden)}: activations that torch.export does not show as calls of their modules, as with "
            "module.forward(x); call the modules themselves, or use a criterion other than latency"
        )
    return table


def _repeatable(module: nn.Module) -> nn.Module:
    """Return a copy of an activation that can be called repeatedly on the same tensor with the same result.

    In-place activations become out-of-place, except for those in `_IDEMPOTENT`.
    """
    copied = copy.deepcopy(module)
    if getattr(copied, "inplace", False) and not isinstance(copied, _IDEMPOTENT):
        # Attributes of a Module are annotated as tensors or modules.
        copied.inplace = False  # type: ignore[assignment]
    return copied


class _Profiler:
    """Times chains of a model, and the convolutions that can approximate series of its modules."""

    def __init__(self, replaceable: set[str]) -> None:
        """Take the paths of the modules that an approximation may replace; empty to time no approximations."""
        self._replaceable = replaceable

    def section(self, chain: Chain, x: Tensor) -> tuple[Section, Tensor]:
        """Time a chain and return its section: the times of its elements, and of series of them that run as one operator.

        Args:
            chain: the chain, with batch norm folded.
            x: its input.

        Returns:
            The section, and the output of the chain for x.
        """
        inputs, branches = [x], {}
        for index, element in enumerate(chain):
            if isinstance(element, Parallel):
                sections, outputs = zip(*(self.section(branch, inputs[-1].clone()) for branch in element.branches), strict=True)
                branches[index] = sections
                inputs.append(_joined(element, outputs))
            else:
                inputs.append(compile_chain((element,), inputs[-1])(inputs[-1].clone()))
        forms = {index: (_alone(element),) for index, element in enumerate(chain)}
        times = _times(forms, {index: inputs[index + (index in branches)] for index in forms})
        parts = tuple(
            Part(times[index], element.name if isinstance(element, Activation) else "", branches.get(index, ()))
            for index, element in enumerate(chain)
        )
        return without_slow_approximations(Section(parts, tuple(self._stretches(chain, inputs))), TIE), inputs[-1]

    def _stretches(self, chain: Chain, inputs: Sequence[Tensor]) -> Iterator[Stretch]:
        """Time each stretch: a series of elements that can run as one operator when the activations in it are removed.

        The stretches with the same first element are timed side by side. To time all stretches at once would need memory for
        all merged weights at the same time.

        Args:
            chain: the chain.
            inputs: the input of each element, and the output of the chain.
        """
        positions = [index for index, element in enumerate(chain) if not isinstance(element, Activation | Flatten)]
        linear = tuple(_linearized(chain[index]) for index in positions)
        sketches = [sketch(element) for element in linear]
        for first, start in enumerate(positions):
            x, ends = inputs[start], [position + 1 for position in positions[first:]]
            forms = {
                (ends[count - 1], kind): form
                for count in promising_stops(linear[first:], sketches[first:], x)
                if count > 1 or isinstance(linear[first], Parallel)
                for kind, form in _merged_forms(fold(linear[first : first + count]), x)
            }
            for count, stop in enumerate(ends[1:] if self._replaceable else (), 2):
                if form := self._projected(chain[start:stop], linear[first : first + count]):
                    forms[stop, "projected"] = form
            for (stop, kind), milliseconds in _times(forms, dict.fromkeys(forms, x)).items():
                modules = _modules(chain[start:stop]) if kind == "projected" else ()
                yield Stretch(start, stop, milliseconds, _sites(chain[start:stop]), modules)

    def _projected(self, chain: Chain, linear: Chain) -> "Chain | None":
        """Return the convolution that would approximate a series of modules, with placeholder weights.

        Args:
            chain: the elements that were read from the modules.
            linear: the same elements without activations.

        Returns:
            A chain of one operator, or None if no smaller convolution can replace the modules.
        """
        names = set(_modules(chain))
        if not names or not names - _sites(chain) <= self._replaceable:
            return None
        try:
            smaller = central_kernel(linear, placeholder_weights)
        except ValueError:
            return None
        return None if smaller.kernel == composed_shape(linear).kernel else (smaller,)


def _merged_forms(chain: Chain, x: Tensor) -> Iterator[tuple[str, Chain]]:
    """Yield the forms in which a stretch without activations may run, each with the name of its kind.

    The weights of a form may be placeholders. They serve for timing only.

    Args:
        chain: the linear elements of the stretch.
        x: their input.
    """
    with contextlib.suppress(ValueError):
        yield "merged", merge(chain, spatial_size(chain, x), composed=placeholder_weights)
    if x.is_cuda:
        with contextlib.suppress(ValueError):
            yield "masked", (with_tap_bias(chain),)
        yield "kernels", fuse_pairs(chain)


def _times(forms: Mapping[Any, Chain], inputs: Mapping[Any, Tensor]) -> dict[Any, float]:
    """Return the milliseconds of each form on the input with the same key; all are timed side by side."""
    gpu = next((x.device for x in inputs.values() if x.is_cuda), None)
    return measure_times(calls(forms, inputs), rounds=11, round_seconds=0.001, graphs_on=gpu)


def _alone(element: Element) -> Element:
    """Return the element to time as a part. Of branches, which are timed separately, this is the joining of their outputs."""
    if isinstance(element, Concatenation):
        return replace(element, branches=((),))
    return replace(element, branches=((),) * len(element.branches)) if isinstance(element, Parallel) else element


def _joined(element: Parallel, outputs: Sequence[Tensor]) -> Tensor:
    """Return the output of an element, given those of its branches."""
    if isinstance(element, Concatenation):
        return torch.cat(tuple(outputs), outputs[0].ndim - element.axes - 1)
    total, *others = outputs
    return sum(others, total)


def _linearized(element: Element) -> Element:
    """Return an element without the activations in its branches."""
    if not isinstance(element, Parallel):
        return element
    branches = (tuple(_linearized(each) for each in branch if not isinstance(each, Activation)) for branch in element.branches)
    return replace(element, branches=tuple(map(fold, branches)))


def _sites(chain: Chain) -> frozenset[str]:
    """Return the names of all sites in a chain, including those inside its branches."""
    names: set[str] = set()
    for element in chain:
        if isinstance(element, Activation):
            names.add(element.name)
        elif isinstance(element, Parallel):
            names.update(*map(_sites, element.branches))
    return frozenset(names)


def _modules(chain: Chain) -> tuple[str, ...]:
    """Return the paths of the modules from which the elements of a chain were read.

    The result is empty if an element was not read from modules, or if two elements were read from the same module.
    """
    names: list[str] = []
    for element in chain:
        if isinstance(element, Activation):
            names.append(element.name)
        elif isinstance(element, AffineOperator) and element.names:
            names += element.names
        else:
            return ()
    return tuple(names) if len(set(names)) == len(names) else ()
