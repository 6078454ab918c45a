"""Choose, for each chain, the form that runs fastest: by measurement, on real inputs, among forms that are proven equal."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from fastentropy.fusion.affine import AffineOperator, Chain, Sum, fold, merge, multiplications, operators, run
from fastentropy.fusion.chains import FoundChain
from fastentropy.fusion.lowering import compile_chain
from fastentropy.fusion.report import Candidate, ChainReport
from fastentropy.timing import Key, measure_times

#: How much faster than the folded chain another form must be to take its place.
TIE = 0.02


@torch.no_grad()
def plan_chain(found: FoundChain, x: Tensor, tolerance: float) -> tuple[Chain, ChainReport]:
    """The fastest form of a chain on the input x among those with a relative error of at most `tolerance`, and the report.

    `keep` is the chain with batch norm folded, `merge` one operator for all of it, `split` the division into merged
    stretches whose measured times add up to the least.
    """
    kept = fold(found.elements)
    if len(operators(kept)) == 1:
        return kept, ChainReport(found.names, {}, "keep")
    forms, note = _forms(kept, x)
    candidates = _measure(forms, found.elements, x)
    times = {name: c.milliseconds for name, c in candidates.items() if c.relative_error <= tolerance}
    if len(times) < len(candidates):
        note = f"above the tolerance of {tolerance:.0e}: {', '.join(name for name in forms if name not in times)}"
    fastest = min(times, key=lambda name: times[name], default="keep")
    choice = fastest if times.get(fastest, 0.0) <= (1 - TIE) * candidates["keep"].milliseconds else "keep"
    return forms[choice], ChainReport(found.names, candidates, choice, note)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference at any position, over the largest finite expected value.

    Infinite where only one of the two is NaN or infinite.
    """
    if not expected.numel():
        return 0.0
    actual = actual.to(expected)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual - expected).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0)
    scale = expected.abs().nan_to_num(0, 0, 0).max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float(difference.max() / scale)


def _forms(kept: Chain, x: Tensor) -> tuple[dict[str, Chain], str]:
    forms, note = {"keep": kept}, ""
    try:
        forms["merge"] = (merge(kept, _spatial_size(kept, x)),)
    except ValueError as error:
        note = str(error)
    split = _fastest_split(kept, x)
    if 1 < len(operators(split)) < len(operators(kept)):
        forms["split"] = split
    return forms, note


def _fastest_split(chain: Chain, x: Tensor) -> Chain:
    """Divide a chain into stretches, each merged or left as it is, so that the sum of their measured times is the least.

    Dynamic programming over the places between elements; the branches of a sum that is not merged are divided likewise.
    """
    inputs = [x]
    for element in chain:
        inputs.append(compile_chain((element,), x)(inputs[-1]))
    stretches = _stretches(chain, inputs)
    times = _time_forms(stretches, {key: inputs[key[0]] for key in stretches})
    best: list[tuple[float, Chain]] = [(0.0, ())]
    for stop in range(1, len(chain) + 1):
        ways = [
            (best[key[0]][0] + times[key], best[key[0]][1] + stretch) for key, stretch in stretches.items() if key[1] == stop
        ]
        best.append(min(ways, key=lambda way: way[0]))
    return best[-1][1]


def _stretches(chain: Chain, inputs: list[Tensor]) -> dict[tuple[int, int, bool], Chain]:
    """Every stretch chain[start:stop] that can stand as one, by (start, stop, whether it is merged)."""
    stretches: dict[tuple[int, int, bool], Chain] = {}
    for start, element in enumerate(chain):
        if isinstance(element, Sum):
            element = Sum(tuple(_fastest_split(branch, inputs[start]) for branch in element.branches))
        stretches[start, start + 1, False] = (element,)
        for stop in range(start + 1, len(chain) + 1):
            stretch = chain[start:stop]
            if isinstance(stretch[-1], AffineOperator) and len(stretch) == 1:
                continue
            try:
                stretches[start, stop, True] = (merge(stretch, _spatial_size(stretch, inputs[start])),)
            except ValueError:
                break
    return stretches


def _spatial_size(chain: Chain, x: Tensor) -> torch.Size:
    return x.shape[x.ndim - len(operators(chain)[0].kernel) :]


def _time_forms(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
    return measure_times({key: functools.partial(compile_chain(form, inputs[key]), inputs[key]) for key, form in forms.items()})


def _measure(forms: Mapping[str, Chain], chain: Chain, x: Tensor) -> dict[str, Candidate]:
    times = _time_forms(forms, dict.fromkeys(forms, x))
    batched = x.ndim > len(operators(chain)[0].kernel) + 1
    few = x[:2] if batched else x
    expected = run(chain, few.double())
    return {
        name: Candidate(
            times[name],
            len(operators(form)),
            multiplications(form, x.shape),
            relative_error(compile_chain(form, x)(few), expected),
        )
        for name, form in forms.items()
    }
