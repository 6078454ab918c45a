"""Choose the form of a chain that runs fastest, by times or by counted costs, among the forms within the tolerance."""

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

#: The share by which another form must be faster than the folded chain to replace it.
TIE = 0.02

#: How many multiplications take as long as moving one byte, in float32 on a server's CPU.
MULTIPLICATIONS_PER_BYTE = 10

#: The same on a GPU: the tensor cores of an H100 do 70 in tf32, PyTorch's default for convolutions, and 150 in 16 bits.
MULTIPLICATIONS_PER_BYTE_ON_A_GPU = 100

#: A merged operator is not composed if its counted cost is more than this many times that of the chain: it cannot be faster.
MAX_COST_RATIO = 1.5

#: Nor is it composed if its weight has more elements than this and than all weights of the chain, counted before the taps that
#: only read padding are removed.
MOST_NUMBERS = 2**26

#: After this many unpromising lengths in a row, no longer stretch is tried. One is not enough: an expansion, a depthwise
#: convolution and a projection are worth merging, the first two alone are not.
MAX_UNPROMISING = 4


class Merged(NamedTuple):
    """A chain as one operator for inputs of one size.

    `form` has placeholder weights and is only for timing: most forms that are timed are not chosen, and composing their weights
    would take longer than timing them. `materialize` returns the form with its real weights.
    """

    form: Chain
    materialize: Callable[[], Chain]


class PlanContext(NamedTuple):
    """How the forms of a chain are made and compared.

    Attributes:
        price: returns the time or the counted cost of each form on its input.
        borders: as in `fuse`.
        fixed_size: whether the spatial size is fixed; otherwise a merged operator must be exact at every size.
        merged: each merged chain by its spatial size and the identities of its elements, with the chain, which keeps these
            identities in use.
    """

    price: Callable[[Mapping[Any, Chain], Mapping[Any, Tensor]], dict[Any, float]]
    borders: Borders
    fixed_size: bool
    merged: dict[tuple[Any, ...], tuple[Chain, Merged]]

    def merge(self, chain: Chain, x: Tensor) -> Chain:
        """Return the chain as one operator for inputs like x, with placeholder weights; see `materialize`."""
        size = spatial_size(chain, x) if self.fixed_size else None
        key = (size, *map(id, chain))
        if key not in self.merged:
            form = merge(chain, size, self.borders, placeholder_weights)
            materialize = functools.cache(functools.partial(merge, chain, size, self.borders))
            self.merged[key] = chain, Merged(form, materialize)
        return self.merged[key][1].form

    def materialize(self, form: Chain) -> Chain:
        """Return the form with the real weights of each operator in it that `merge` made."""
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
    """Choose the fastest form of a chain.

    The candidates are:
        keep: the chain with batch norm folded.
        merge: one operator for the whole chain.
        split: the chain divided into stretches, each merged or kept, so that the sum of their times is least.
        reorder: the same after average pooling was moved forward.
        kernel: on a GPU, the chain with pairs of operators in fused kernels.
        masked: on a GPU, one kernel that leaves out, at the border, what the merged operator would add for padding.

    Args:
        found: the chain.
        x: a value of the chain's source.
        tolerance: the largest relative error of a form that may be chosen.
        measure: compare times; otherwise counted costs.
        borders: as in `fuse`.
        merged: what was merged before, to be reused for the same chain and size in another memory format.

    Returns:
        The chosen form, and the report.
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
    equal = [name for name, candidate in candidates.items() if candidate.relative_error <= tolerance]
    if len(equal) < len(candidates):
        note = f"above the tolerance of {tolerance:.0e}: {', '.join(name for name in forms if name not in equal)}"
    fastest = min(equal, key=lambda name: prices[name], default="keep")
    choice = fastest if prices[fastest] <= (1 - TIE) * prices["keep"] else "keep"
    if borders == "train":
        note = f"differs at the border by {_chain_error(forms[choice], found.elements, x):.0e}, to be trained"
    return forms[choice], ChainReport(found.names, candidates, choice, note)


def measured(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Return the milliseconds of each form on its input, timed side by side."""
    gpu = next((x.device for x in inputs.values() if x.is_cuda), None)
    if len(forms) <= 6:
        return measure_times(calls(forms, inputs), graphs_on=gpu)
    return measure_times(calls(forms, inputs), rounds=5, round_seconds=0.001, graphs_on=gpu)


def calls(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, Callable[[], Tensor]]:
    """Return a call of each form on its input, to be timed."""
    return {key: functools.partial(compile_chain(form, inputs[key]), inputs[key]) for key, form in forms.items()}


def counted(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Return the cost of each form on its input, in multiplications: a stand-in for its time that counts bytes as well."""
    return {key: _counted_cost(form, inputs[key]) for key, form in forms.items()}


def _counted_cost(form: Chain, x: Tensor) -> float:
    multiplications, moved = cost(form, x.shape, x.element_size())
    return multiplications + (MULTIPLICATIONS_PER_BYTE_ON_A_GPU if x.is_cuda else MULTIPLICATIONS_PER_BYTE) * moved


def _chain_error(form: Chain, chain: Chain, x: Tensor) -> float:
    """Return the relative error of a form on the first sample of x and on a random one of the same size."""
    batched = x.ndim > len(operators(chain)[0].axes) + 1
    generator = torch.Generator().manual_seed(0)
    given = x[:1] if batched else x
    drawn = torch.randn(given.shape, generator=generator).to(given) * given.std(correction=0)
    compiled = compile_chain(form, given)
    with full_precision():
        return max(relative_error(compiled(each), run(chain, each.double())) for each in (given, drawn))


def _forms(kept: Chain, x: Tensor, context: PlanContext) -> tuple[dict[str, Chain], str]:
    """Return the candidates by name, and why the chain cannot be merged; empty if it can."""
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
    """Return whether a split is the chain as it is or the one operator of the merged chain, which are candidates already."""
    merged = "merge" in forms and len(split) == len(forms["merge"]) and not isinstance(split[0], Sum)
    return merged or list(map(id, operators(split))) == list(map(id, operators(forms["keep"])))


def _fastest_split(chain: Chain, x: Tensor, context: PlanContext) -> Chain:
    """Divide a chain into stretches, each merged or kept, so that the sum of their times is least.

    This is dynamic programming over the places between elements. The branches of a sum that is not merged are divided in the
    same way.
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
    """Return each element and each merged stretch chain[start:stop] that may be worth it, by (start, stop, is merged)."""
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
    """Return an element as one operator on the meta device.

    None where it is no single operator, as when the sizes of its branches agree for some inputs only.
    """
    try:
        return None if isinstance(element, Flatten) else composed_shape((element,))
    except ValueError:
        return None


def promising_stops(chain: Chain, sketches: list[AffineOperator | None], x: Tensor) -> Iterator[int]:
    """Yield how many elements, counted from the first, may be worth merging.

    Args:
        chain: the elements.
        sketches: each element as `sketch` returns it.
        x: the input of the first element.
    """
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
    """Return whether a merged operator, given on the meta device, would cost too much more than the chain to be composed."""
    if merged.weight.numel() > max(MOST_NUMBERS, sum(operator.weight.numel() for operator in operators(chain))):
        return True
    cropped = crop_kernel(merged, spatial_size(chain, x))
    return _counted_cost((cropped,), x) > MAX_COST_RATIO * _counted_cost(chain, x)
