"""Choose, for each chain, the form that runs fastest: by measurement, on real inputs, among forms that are proven equal."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastentropy._utils.timing import Key, measure_times
from fastentropy.fusion.chains.affine import AffineOperator, compose
from fastentropy.fusion.chains.elements import Chain, Element, Flatten, Sum, cost, operators, run, spatial_size
from fastentropy.fusion.chains.finding import FoundChain
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import Borders, composed_shape, crop_kernel, merge, placeholder_weights, with_tap_bias
from fastentropy.fusion.chains.passes import fuse_pairs, move_pools_forward
from fastentropy.fusion.report import Candidate, ChainReport
from fastentropy.fusion.verification import full_precision, relative_error

#: How much faster than the folded chain another form must be to take its place.
TIE = 0.02

#: Multiplications in the time of one byte, in float32 on a server's processor.
MULTIPLICATIONS_PER_BYTE = 10

#: The same on a GPU: on the tensor cores of an H100 70 in tf32, which is PyTorch's default for convolutions, to 150 in 16 bits.
MULTIPLICATIONS_PER_BYTE_ON_A_GPU = 100

#: A merged operator is not composed where its counted cost is so many times that of the chain: it could not be faster.
MAX_COST_RATIO = 1.5

#: Nor is it where its weight has more numbers than this and than all of the chain's, before taps that only read padding go.
MOST_NUMBERS = 2**26

#: A stretch is not made longer after so many lengths without hope: an expansion, a depthwise convolution and a projection
#: are worth merging though the first two are not.
MAX_UNPROMISING = 4


class Merged(NamedTuple):
    """A chain as one operator for inputs of one size: `form` is good for timing, and `materialize` gives the operator itself.

    Most of what is timed is not chosen, and composing its weights would take longer than timing it.
    """

    form: Chain
    materialize: Callable[[], Chain]


class PlanContext(NamedTuple):
    """How forms are made, and what they are chosen by.

    merged remembers what was merged, by its size and the identity of its elements; the chain is kept for its identity.
    """

    price: Callable[[Mapping[Any, Chain], Mapping[Any, Tensor]], dict[Any, float]]
    borders: Borders
    fixed_size: bool
    merged: dict[tuple[Any, ...], tuple[Chain, Merged]]

    def merge(self, chain: Chain, x: Tensor) -> Chain:
        """The chain as one operator for inputs like x, of this size or of any; only good for timing, see `materialize`."""
        size = spatial_size(chain, x) if self.fixed_size else None
        key = (size, *map(id, chain))
        if key not in self.merged:
            form = merge(chain, size, self.borders, placeholder_weights)
            materialize = functools.cache(functools.partial(merge, chain, size, self.borders))
            self.merged[key] = chain, Merged(form, materialize)
        return self.merged[key][1].form

    def materialize(self, form: Chain) -> Chain:
        """The form with what `merge` made in it as operators with their weights."""
        made = {id(merged.form[0]): merged for _, merged in self.merged.values()}

        def materialized(element: Element) -> Element:
            if id(element) in made:
                return made[id(element)].materialize()[0]
            return Sum(tuple(map(self.materialize, element.branches))) if isinstance(element, Sum) else element

        return tuple(map(materialized, form))


@torch.no_grad()
def plan_chain(
    found: FoundChain,
    x: Tensor,
    tolerance: float,
    *,
    measure: bool = True,
    borders: Borders = "exact",
    merged: dict[tuple[Any, ...], tuple[Chain, Merged]] | None = None,
) -> tuple[Chain, ChainReport]:
    """The fastest form of a chain on the input x among those with a relative error of at most `tolerance`, and the report.

    `keep` is the chain with batch norm folded, `merge` one operator for all of it, `split` the division into merged
    stretches whose times add up to the least, `reorder` that with average pooling moved forward, and `kernel` the chain with
    pairs of operators in fused kernels, `masked` one kernel that leaves out, at the border, what only padding would add.
    Without `measure`, counted costs stand for the times. `merged` remembers what was composed, for the same chain and size in
    another memory format.
    """
    kept = found.folded
    if len(operators(kept)) == 1:
        return kept, ChainReport(found.names, {}, "keep")
    context = PlanContext(measured if measure else counted, borders, found.has_fixed_size, {} if merged is None else merged)
    forms, note = _forms(kept, x, context)
    prices = context.price(forms, dict.fromkeys(forms, x))
    candidates = {
        name: Candidate(
            prices[name] if measure else None,
            len(operators(form)),
            *cost(form, x.shape, x.element_size()),
            _chain_error(form, found.elements if borders == "exact" else form, x),
        )
        for name, form in forms.items()
    }
    proven = [name for name, candidate in candidates.items() if candidate.relative_error <= tolerance]
    if len(proven) < len(candidates):
        note = f"above the tolerance of {tolerance:.0e}: {', '.join(name for name in forms if name not in proven)}"
    fastest = min(proven, key=lambda name: prices[name], default="keep")
    choice = fastest if prices[fastest] <= (1 - TIE) * prices["keep"] else "keep"
    if borders == "train":
        note = f"differs at the border by {_chain_error(forms[choice], found.elements, x):.0e}, to be trained"
    return forms[choice], ChainReport(found.names, candidates, choice, note)


def measured(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
    """The milliseconds of each form on its input, timed side by side."""
    gpu = next((x.device for x in inputs.values() if x.is_cuda), None)
    if len(forms) <= 6:
        return measure_times(calls(forms, inputs), graphs_on=gpu)
    return measure_times(calls(forms, inputs), rounds=5, round_seconds=0.001, graphs_on=gpu)


def calls(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, Callable[[], Tensor]]:
    """A call of each form on its input, to be timed."""
    return {key: functools.partial(compile_chain(form, inputs[key]), inputs[key]) for key, form in forms.items()}


def counted(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
    """The multiplications of each form and its bytes in terms of them, in place of a time."""
    return {key: _counted_cost(form, inputs[key]) for key, form in forms.items()}


def _counted_cost(form: Chain, x: Tensor) -> float:
    multiplications, moved = cost(form, x.shape, x.element_size())
    return multiplications + (MULTIPLICATIONS_PER_BYTE_ON_A_GPU if x.is_cuda else MULTIPLICATIONS_PER_BYTE) * moved


def _chain_error(form: Chain, chain: Chain, x: Tensor) -> float:
    """The error of a form on a given value and on a random one of the same size."""
    batched = x.ndim > len(operators(chain)[0].axes) + 1
    generator = torch.Generator().manual_seed(0)
    given = x[:1] if batched else x
    drawn = torch.randn(given.shape, generator=generator).to(given) * given.std(correction=0)
    compiled = compile_chain(form, given)
    with full_precision():
        return max(relative_error(compiled(each), run(chain, each.double())) for each in (given, drawn))


def _forms(kept: Chain, x: Tensor, context: PlanContext) -> tuple[dict[str, Chain], str]:
    forms: dict[str, Chain] = {"keep": kept}
    note = ""
    try:
        body = kept[:-1] if isinstance(kept[-1], Flatten) else kept
        if _is_unpromising(composed_shape(body), body, x):
            note = f"one operator would cost more than {MAX_COST_RATIO} times as much"
        else:
            forms["merge"] = context.materialize(context.merge(kept, x))
    except ValueError as error:
        note = str(error)
    split = _fastest_split(kept, x, context)
    if not _is_known(split, forms):
        forms["split"] = context.materialize(split)
    if (reordered := move_pools_forward(kept)) != kept:
        forms["reorder"] = context.materialize(_fastest_split(reordered, x, context))
    if x.is_cuda and context.borders == "exact":
        if (paired := fuse_pairs(kept)) != kept:
            forms["kernel"] = paired
        with contextlib.suppress(ValueError):
            forms["masked"] = (with_tap_bias(kept),)
    return forms, note


def _is_known(split: Chain, forms: Mapping[str, Chain]) -> bool:
    """Whether a division left the chain as it is, or made of it the one operator that the merged chain is already."""
    merged = "merge" in forms and len(split) == len(forms["merge"]) and not isinstance(split[0], Sum)
    return merged or list(map(id, operators(split))) == list(map(id, operators(forms["keep"])))


def _fastest_split(chain: Chain, x: Tensor, context: PlanContext) -> Chain:
    """Divide a chain into stretches, each merged or left as it is, so that the sum of their times is the least.

    Dynamic programming over the places between elements; the branches of a sum that is not merged are divided likewise.
    """
    inputs = [x]
    for element in chain:
        inputs.append(compile_chain((element,), inputs[-1])(inputs[-1]))
    stretches = _stretches(chain, inputs, context)
    times = context.price(stretches, {key: inputs[key[0]] for key in stretches})
    best: list[tuple[float, Chain]] = [(0.0, ())]
    for stop in range(1, len(chain) + 1):
        divisions = [
            (best[key[0]][0] + times[key], best[key[0]][1] + stretch) for key, stretch in stretches.items() if key[1] == stop
        ]
        best.append(min(divisions, key=lambda division: division[0]))
    return best[-1][1]


def _stretches(chain: Chain, inputs: list[Tensor], context: PlanContext) -> dict[tuple[int, int, bool], Chain]:
    """Every stretch chain[start:stop] that can stand as one, by (start, stop, whether it is merged)."""
    stretches: dict[tuple[int, int, bool], Chain] = {}
    sketches = [sketch(element) for element in chain]
    for start, element in enumerate(chain):
        x = inputs[start]
        if isinstance(element, Sum):
            element = Sum(tuple(_fastest_split(branch, x, context) for branch in element.branches))
        stretches[start, start + 1, False] = (element,)
        for stop in promising_stops(chain[start:], sketches[start:], x):
            if stop > 1 or isinstance(element, Sum):
                with contextlib.suppress(ValueError):
                    stretches[start, start + stop, True] = context.merge(chain[start : start + stop], x)
    return stretches


def sketch(element: Element) -> AffineOperator | None:
    """An element as one operator without memory; None where it is none, as if the sizes of branches only happen to agree."""
    try:
        return None if isinstance(element, Flatten) else composed_shape((element,))
    except ValueError:
        return None


def promising_stops(chain: Chain, sketches: list[AffineOperator | None], x: Tensor) -> Iterator[int]:
    """How many elements from the first on may be worth merging, by the counted cost of the one operator and of the chain."""
    merged, unpromising = sketches[0], 0
    for stop in range(1, len(chain) + 1):
        last = sketches[stop - 1]
        try:
            merged = merged if stop == 1 or merged is None or last is None else compose(merged, last)
        except ValueError:
            return
        if merged is None or last is None or unpromising == MAX_UNPROMISING:
            return
        if _is_unpromising(merged, chain[:stop], x):
            unpromising += 1
        else:
            unpromising = 0
            yield stop


def _is_unpromising(merged: AffineOperator, chain: Chain, x: Tensor) -> bool:
    """Whether a merged operator, known by its shape, would cost so much more than the chain that it need not be composed."""
    if merged.weight.numel() > max(MOST_NUMBERS, sum(operator.weight.numel() for operator in operators(chain))):
        return True
    cropped = crop_kernel(merged, spatial_size(chain, x))
    return _counted_cost((cropped,), x) > MAX_COST_RATIO * _counted_cost(chain, x)
