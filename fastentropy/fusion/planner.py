"""Choose the fastest form of a chain among those within the tolerance, by measured times or by counted costs.

A chain is a stretch of linear operators. A form is one way to compute it, as a chain of other elements. The price of a form is
its time or its counted cost.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastentropy.fusion.chain_error import ChainReference
from fastentropy.fusion.chains.affine import AffineOperator, compose
from fastentropy.fusion.chains.elements import Chain, Element, Flatten, Parallel, cost, operators, spatial_size
from fastentropy.fusion.chains.finding import FoundChain
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import (
    Borders,
    compose_chain,
    composed_shape,
    crop_kernel,
    merge,
    placeholder_weights,
    with_tap_bias,
)
from fastentropy.fusion.chains.passes import fuse_pairs, move_pools_forward, move_upsampling_back
from fastentropy.fusion.pricing import Price, SharedPrices, counted, counted_cost, measured
from fastentropy.fusion.report import Candidate, ChainReport
from fastentropy.fusion.verification import judge

#: Another form replaces the chain with batch norm folded only if it saves at least this share of the chain's price.
TIE = 0.02

#: A merged operator is not composed if its counted cost is more than this many times that of the chain, because it would
#: not be faster.
MAX_COST_RATIO = 1.5

#: A merged operator is not composed either if its weight has more elements than this number, and more than all weights of the
#: chain. Taps that only read padding count as well, although they are removed later.
MAX_NUMBERS = 2**26

#: A merged weight with more elements than this number is stored in the dtype in which it is to run as soon as it is composed.
LARGE = 2**20

#: From each element on, merging is tried for 1, 2, 3, … elements, until this many lengths in a row are too costly. One costly
#: length must not end the search. An example is a 1×1 convolution that increases the channels, a depthwise convolution, and a
#: 1×1 convolution that reduces the channels: all three are worth merging, the first two alone are not.
MAX_UNPROMISING = 4

#: The largest number of elements that are merged as a part of a chain, so that the time to plan is linear in the length of the
#: chain. As a whole, a chain of any length is merged.
MAX_ELEMENTS = 16

#: Forms of stretches of a chain, by the first element, the element behind the last one, and whether they are merged.
_Stretches: TypeAlias = dict[tuple[int, int, bool], Chain]


class Merged(NamedTuple):
    """A chain merged into one operator for inputs of one spatial size.

    Most merged operators are only timed and never chosen, and composing their weights takes longer than timing them. The
    weights are therefore composed on demand.

    Attributes:
        form: the merged chain with placeholder weights, for timing only.
        materialize: returns the merged chain with its real weights.
    """

    form: Chain
    materialize: Callable[[], Chain]


class PlanContext(NamedTuple):
    """The settings with which the forms of one chain are made and compared, and a cache of its merged stretches.

    Attributes:
        price: returns the time or the counted cost of each form, given the forms and their inputs by the same keys.
        borders: as in `fuse`.
        fixed_size: whether all inputs have the same spatial size. If not, a merged operator must be exact at every size.
        merged: the cache. The key is the spatial size and the `id` of each element of a chain. The value is that chain, which
            must stay alive so that no other object gets these ids, and the merged chain.
    """

    price: Price
    borders: Borders
    fixed_size: bool
    merged: dict[tuple[Any, ...], tuple[Chain, Merged]]

    def merge(self, chain: Chain, x: Tensor) -> Chain:
        """Merge a chain into one operator for inputs of the size of x, with placeholder weights; see `materialize`.

        Raises ValueError if the chain cannot be merged.
        """
        size = spatial_size(chain, x) if self.fixed_size else None
        key = (size, *map(id, chain))
        if key not in self.merged:
            form = merge(chain, size, self.borders, placeholder_weights)
            dtype = x.dtype if operators(form)[0].weight.numel() > LARGE else torch.float64
            composed = functools.partial(compose_chain, dtype=dtype)
            materialize = functools.cache(functools.partial(merge, chain, size, self.borders, composed))
            self.merged[key] = chain, Merged(form, materialize)
        return self.merged[key][1].form

    def materialize(self, form: Chain) -> Chain:
        """Return a form with the real weights in place of all placeholders that `merge` made."""
        made = {id(merged.form[0]): merged for _, merged in self.merged.values()}

        def materialized(element: Element) -> Element:
            if id(element) in made:
                return made[id(element)].materialize()[0]
            if isinstance(element, Parallel):
                return replace(element, branches=tuple(map(self.materialize, element.branches)))
            return element

        return tuple(map(materialized, form))


@torch.no_grad()
def plan_chain(
    found: FoundChain,
    x: Tensor,
    tolerance: float,
    *,
    measure: bool = True,
    borders: Borders = "exact",
    prices: SharedPrices | None = None,
) -> tuple[Chain, ChainReport]:
    """Choose the fastest form of a chain.

    The candidates are:
        keep: the chain with batch norm folded.
        merge: one operator for the whole chain.
        split: the chain divided into stretches, each merged or kept, such that the sum of their prices is smallest.
        reorder: a split of the chain after average pooling was moved forward, and nearest upsampling back.
        kernel: on a GPU, the chain with each suitable pair of operators in one kernel.
        masked: on a GPU, one operator with a bias per tap, which is left out where the tap reads padding (`TapBiased`).

    Args:
        found: the chain, as `find_chains` returns it.
        x: an input of the chain.
        tolerance: the largest relative error that the chosen form may have.
        measure: compare measured times. False compares counted costs.
        borders: as in `fuse`.
        prices: what calls for the chains of one network share (see `shared_prices`); without it, nothing is shared.

    Returns:
        The chosen form, and the report on all candidates.
    """
    kept = found.folded
    if len(operators(kept)) == 1:
        return kept, ChainReport(found.names, {}, "keep", ended_by=found.ended_by)
    context = PlanContext(prices or shared_prices(measure), borders, found.has_fixed_size, {})
    forms, note = _forms(kept, x, context)
    price = context.price(forms, dict.fromkeys(forms, x))
    exact = ChainReference(found.elements, x) if borders == "exact" else None
    candidates = {
        name: Candidate(
            price[name] if measure else None,
            len(operators(form)),
            *cost(form, x.shape, x.element_size()),
            (exact or ChainReference(form, x)).error(form),
        )
        for name, form in forms.items()
    }
    equal = [name for name, candidate in candidates.items() if candidate.relative_error <= tolerance]
    if len(equal) < len(candidates):
        own_error = exact.error(found.elements) if exact else 0.0
        judged = {name: judge(candidate.relative_error, own_error, tolerance) for name, candidate in candidates.items()}
        equal = [name for name in forms if judged[name].holds]
        wrong = [name for name in forms if name not in equal]
        note = f"above {judged[wrong[0]].bound}: {', '.join(wrong)}" if wrong else note
    fastest = min(equal, key=lambda name: price[name], default="keep")
    choice = fastest if price[fastest] <= (1 - TIE) * price["keep"] else "keep"
    if borders == "train":
        note = f"differs at the border by {ChainReference(found.elements, x).error(forms[choice]):.0e}, to be trained"
    return forms[choice], ChainReport(found.names, candidates, choice, note, found.ended_by)


def shared_prices(measure: bool) -> SharedPrices:
    """Return prices for the plans of all chains of one network: measured times or counted costs."""
    return SharedPrices(measured if measure else counted)


def _forms(kept: Chain, x: Tensor, context: PlanContext) -> tuple[dict[str, Chain], str]:
    """Make the candidates of `plan_chain`.

    Args:
        kept: the chain with batch norm folded.
        x: an input of the chain.
        context: the settings.

    Returns:
        The candidates by name, and the reason why the chain is not merged as a whole, or "" if it is.
    """
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
    if (reordered := move_upsampling_back(move_pools_forward(kept))) != kept:
        forms["reorder"] = context.materialize(_fastest_split(reordered, x, context))
    if x.is_cuda and context.borders == "exact":
        if (paired := fuse_pairs(kept)) != kept:
            forms["kernel"] = paired
        with contextlib.suppress(ValueError):
            forms["masked"] = (with_tap_bias(kept),)
    return forms, note


def _is_known(split: Chain, forms: Mapping[str, Chain]) -> bool:
    """Return whether a split is a candidate already: the chain as it is, or the merged chain."""
    merged = "merge" in forms and len(split) == len(forms["merge"]) and not isinstance(split[0], Parallel)
    return merged or list(map(id, operators(split))) == list(map(id, operators(forms["keep"])))


def _fastest_split(chain: Chain, x: Tensor, context: PlanContext) -> Chain:
    """Divide a chain into stretches, each merged or kept, such that the sum of their prices is smallest.

    This is dynamic programming over the positions between elements. The branches of a sum are divided in the same way, unless
    the sum is merged. x is an input of the chain. Merged stretches in the result have placeholder weights.
    """
    inputs = [x]
    for element in chain:
        inputs.append(compile_chain((element,), inputs[-1])(inputs[-1]))
    stretches = _competitive(_stretches(chain, inputs, context), inputs)
    times = context.price(stretches, {key: inputs[key[0]] for key in stretches})
    best: list[tuple[float, Chain]] = [(0.0, ())]
    for stop in range(1, len(chain) + 1):
        divisions = [
            (best[key[0]][0] + times[key], best[key[0]][1] + stretch) for key, stretch in stretches.items() if key[1] == stop
        ]
        best.append(min(divisions, key=lambda division: division[0]))
    return best[-1][1]


def _stretches(chain: Chain, inputs: list[Tensor], context: PlanContext) -> _Stretches:
    """Return each element of a chain, and each merged stretch chain[start:stop] that may be faster than its elements.

    Args:
        chain: the chain.
        inputs: the input of each element, and the output of the chain.
        context: the settings.

    Returns:
        The forms by (start, stop, whether the stretch is merged).
    """
    stretches: _Stretches = {}
    sketches = [sketch(element) for element in chain]
    for start, element in enumerate(chain):
        x = inputs[start]
        if isinstance(element, Parallel):
            element = replace(element, branches=tuple(_fastest_split(branch, x, context) for branch in element.branches))
        stretches[start, start + 1, False] = (element,)
        end = start + MAX_ELEMENTS
        for stop in promising_stops(chain[start:end], sketches[start:end], x):
            if stop > 1 or isinstance(element, Parallel):
                with contextlib.suppress(ValueError):
                    stretches[start, start + stop, True] = context.merge(chain[start : start + stop], x)
    return stretches


def _competitive(stretches: _Stretches, inputs: list[Tensor]) -> _Stretches:
    """Return the stretches without those that are far more costly than others of the same elements, one behind the other.

    The costs are counted, which takes less time than a measurement. The arguments are those of `_stretches`.
    """
    costs = {key: counted_cost(form, inputs[key[0]]) for key, form in stretches.items()}
    competitive, ending = {}, defaultdict(list)
    for part in stretches:
        ending[part[1]].append(part)
    for key, form in stretches.items():
        start, stop, is_merged = key
        cheapest = {start: 0.0}  # of all divisions of the elements from `start` to a position
        for end in range(start + 1, stop + 1):
            cheapest[end] = min(cheapest[part[0]] + costs[part] for part in ending[end] if part[0] >= start)
        if not is_merged or costs[key] <= MAX_COST_RATIO * cheapest[stop]:
            competitive[key] = form
    return competitive


def sketch(element: Element) -> AffineOperator | None:
    """Return an element as one operator on the meta device, which has shapes but no values.

    Returns None if the element is not a single operator: a `Flatten`, or branches that have no common operator.
    """
    try:
        return None if isinstance(element, Flatten) else composed_shape((element,))
    except ValueError:
        return None


def promising_stops(chain: Chain, sketches: list[AffineOperator | None], x: Tensor) -> Iterator[int]:
    """Yield each number n for which merging the first n elements may make the chain faster.

    Args:
        chain: the elements.
        sketches: what `sketch` returns for each element.
        x: an input of the first element.
    """
    merged, unpromising = sketches[0], 0
    for stop in range(1, min(len(chain), MAX_ELEMENTS) + 1):
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
    """Return whether a merged operator would be too large or too costly to be worth composing.

    Args:
        merged: the operator on the meta device.
        chain: the chain that it would replace.
        x: an input of the chain.
    """
    if merged.weight.numel() > max(MAX_NUMBERS, sum(operator.weight.numel() for operator in operators(chain))):
        return True
    cropped = crop_kernel(merged, spatial_size(chain, x))
    return counted_cost((cropped,), x) > MAX_COST_RATIO * counted_cost(chain, x)
