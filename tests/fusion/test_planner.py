"""The choice follows the measured times, or the counted costs, among forms that are equal."""

import contextlib
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy.fusion import chain_error, planner, pricing
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import BorderCorrected, Flatten, Sum, cost, operators, run
from fastentropy.fusion.chains.finding import FoundChain
from fastentropy.fusion.chains.merging import merge
from tests._helpers.chains import chains
from tests._helpers.operators import average

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def operator(out_channels, in_channels, kernel, padding=0, groups=1):
    weight = torch.randn(out_channels, in_channels // groups, kernel, kernel, dtype=torch.float64)
    return AffineOperator(weight, torch.randn(out_channels).double(), (1, 1), (padding,) * 2, (1, 1), groups)


def found(*elements):
    return FoundChain(None, None, (), 2, lambda: elements, tuple(f"conv{index}" for index in range(len(elements))))


def price(chain):
    """A made-up price of a chain that is not just its number of operators."""
    return sum(1.0 + 0.001 * (o.weight.numel() % 97) for o in operators(chain))


@pytest.fixture
def priced(monkeypatch):
    """Every form costs what `price` says, and none is too costly to try; returns a way to set another price."""

    def set_price(price):
        monkeypatch.setattr(planner, "measured", lambda forms, inputs: {key: price(form) for key, form in forms.items()})

    monkeypatch.setattr(planner, "MAX_COST_RATIO", float("inf"))
    set_price(price)
    return set_price


@pytest.fixture
def untimed(monkeypatch):
    """Nothing may be measured."""
    monkeypatch.setattr(planner, "measured", None)


def equal(form, chain, x=X):
    torch.testing.assert_close(run(form, x.double()), run(chain, x.double()), rtol=1e-9, atol=1e-9)


BLOCK = (operator(12, 4, 1), operator(12, 12, 3, 1, groups=12), operator(4, 12, 1))


def test_fastest_form_is_chosen(priced):
    chain, report = planner.plan_chain(found(*BLOCK), X, 1e-5)
    assert (report.choice, len(chain)) == ("merge", 1)
    assert set(report.candidates) == {"keep", "merge"}


@pytest.mark.parametrize(("merged", "choice"), [(0.97, "merge"), (0.99, "keep"), (1.5, "keep")])
def test_chain_is_kept_on_a_tie(priced, merged, choice):
    priced(lambda form: merged if len(operators(form)) == 1 else 1.0)
    assert planner.plan_chain(found(*BLOCK), X, 1e-5)[1].choice == choice


def test_split_is_the_cheapest_division(priced):
    chain = (*BLOCK, operator(4, 4, 3, 1), operator(8, 4, 1), operator(4, 8, 3, 1), operator(4, 4, 1))
    best = float("inf")
    for cuts in itertools.product([False, True], repeat=len(chain) - 1):
        bounds = [0, *(index + 1 for index, cut in enumerate(cuts) if cut), len(chain)]
        stretches = [chain[start:stop] for start, stop in itertools.pairwise(bounds)]
        with contextlib.suppress(ValueError):
            best = min(best, sum(price(merge(s, (6, 6)) if len(s) > 1 else s) for s in stretches))
    form, report = planner.plan_chain(found(*chain), X, 1e-5)
    assert report.choice == "split"
    assert price(form) == pytest.approx(best)
    equal(form, chain)


def divisions(chain):
    """Every way to merge stretches of a chain, within the branches of its sums too."""
    if not chain:
        yield ()
    for stop in range(1, len(chain) + 1):
        heads = [chain[:1]] if stop == 1 else []
        if stop == 1 and isinstance(chain[0], Sum):
            heads = [(Sum(branches),) for branches in itertools.product(*map(list, map(divisions, chain[0].branches)))]
        with contextlib.suppress(ValueError):
            heads.append(merge(chain[:stop], (6, 6)))
        yield from ((*head, *tail) for head in heads for tail in divisions(chain[stop:]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_split_reaches_into_sums(priced, seed):
    torch.manual_seed(seed)
    long = (operator(6, 4, 1), operator(6, 6, 3, 1), operator(8, 6, 1), operator(4, 8, 3, 1))
    chain = (operator(4, 4, 1), Sum((long, ())), operator(5, 4, 1), operator(4, 5, 1))
    prices = {
        shape: random.Random(f"{seed}{shape}").uniform(1, 2) for shape in itertools.product(range(1, 9), range(1, 9), (1, 3, 5))
    }

    def by_shape(form):
        return sum(prices[o.out_channels, o.in_channels, o.kernel[0]] for o in operators(form))

    priced(by_shape)
    form, report = planner.plan_chain(found(*chain), X, 1e-5)
    assert report.choice == "split"
    assert by_shape(form) == pytest.approx(min(map(by_shape, divisions(chain))))
    equal(form, chain)


@pytest.mark.slow
@settings(max_examples=12)
@given(chains(largest=(8, 8, 3), batch=1))
def test_form_chosen_by_counting_equals_the_chain(drawn):
    chain, x, y = drawn
    form, report = planner.plan_chain(found(*chain), x, 1e-7, measure=False)
    torch.testing.assert_close(run(form, x), y, rtol=1e-7, atol=1e-7)
    assert report.choice == "keep" or report.candidates[report.choice].relative_error <= 1e-7


def test_chosen_form_equals_the_chain(priced):
    for chain in (BLOCK, (*BLOCK, operator(4, 4, 3, 1)), (operator(4, 4, 3, 1), operator(6, 4, 1), operator(4, 6, 3, 1))):
        form, report = planner.plan_chain(found(*chain), X, 1e-5)
        equal(form, chain)
        assert report.candidates[report.choice].relative_error <= 1e-5


def test_inner_padding_is_merged_with_a_border(priced):
    priced(lambda form: 1.0 if isinstance(form[0], BorderCorrected) else 2.0)
    chain = (operator(4, 4, 3, 1), operator(4, 4, 3, 1))
    form, report = planner.plan_chain(found(*chain), X, 1e-5)
    assert report.choice == "merge"
    assert isinstance(form[0], BorderCorrected)
    equal(form, chain)


def test_reason_why_a_chain_is_not_merged(priced):
    _, report = planner.plan_chain(found(operator(4, 4, 3, 1), operator(4, 4, 3, 1)), X[..., :2, :2], 1e-5)
    assert "merge" not in report.candidates
    assert "inner zero padding" in report.note


def test_counts_of_candidates(priced):
    chain = (Sum((BLOCK, ())), operator(4, 4, 1, groups=4))
    _, report = planner.plan_chain(found(*chain), X, 1e-5)
    counts = {name: (c.operators, c.multiplications) for name, c in report.candidates.items()}
    kept = 48 + 9 * 12 + 48 + 4
    assert counts == {"keep": (4, 2 * 36 * kept), "merge": (1, 2 * 36 * 9 * 16)}
    assert report.candidates["keep"].bytes == cost(chain, X.shape, 4).bytes


@given(st.permutations(("keep", "merge", "split")))
def test_choice_among_measured_forms(order):
    chain = (*BLOCK, operator(4, 4, 3, 1), operator(4, 4, 1))
    split = (operator(4, 4, 3, 1), operator(4, 4, 3, 1), operator(4, 4, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "MAX_COST_RATIO", float("inf"))
        patch.setattr(planner, "merge", lambda chain, *_: (operator(chain[-1].out_channels, chain[0].in_channels, 3, 1),))
        patch.setattr(planner, "_fastest_split", lambda *_: split)
        patch.setattr(planner, "measured", lambda forms, inputs: {name: 1.0 + order.index(name) for name in forms})
        form, report = planner.plan_chain(found(*chain), X, tolerance=float("inf"))
    assert report.choice == order[0]
    assert len(form) == {"keep": 5, "merge": 1, "split": 3}[order[0]]


def test_form_above_the_tolerance_is_named(priced, monkeypatch):
    wrong = (operator(4, 4, 3, 1),)
    monkeypatch.setattr(planner, "merge", lambda chain, *_: wrong)
    _, report = planner.plan_chain(found(*BLOCK), X, 1e-5)
    assert report.choice == "keep"
    assert report.note.startswith("above the tolerance of 1e-05: merge")
    assert report.candidates["merge"].relative_error > 1e-5


@pytest.mark.parametrize("wrong", [False, True])
def test_errors_are_judged_by_that_of_the_chain_itself(priced, monkeypatch, wrong):
    """Large biases that cancel leave three digits in float32, whether the chain is merged or not."""
    up, down = operator(4, 4, 1), operator(4, 4, 1)
    up.bias.fill_(3e4)
    down.bias.copy_(-3e4 * down.weight.sum((1, 2, 3)))
    chain = (up, down)
    merged = merge(chain, X.shape[2:], "exact")
    merged[0].weight.mul_(1.1 if wrong else 1.0)
    monkeypatch.setattr(planner, "merge", lambda *_: merged)
    _, report = planner.plan_chain(found(*chain), X, 1e-7)
    assert report.candidates["keep"].relative_error > 1e-5
    assert report.choice == ("keep" if wrong else "merge")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_form_that_is_not_finite_is_not_chosen(priced, monkeypatch, value):
    broken = operator(4, 4, 3, 1)
    broken.bias.fill_(value)
    monkeypatch.setattr(planner, "merge", lambda chain, *_: (broken,))
    assert planner.plan_chain(found(*BLOCK), X, 1e-5)[1].choice == "keep"


def test_single_operator_has_no_candidates(untimed):
    form, report = planner.plan_chain(found(operator(4, 4, 3, 1), operator(4, 4, 1, groups=4)), X, 1e-5)
    assert (len(form), report.candidates, report.choice) == (1, {}, "keep")


def test_counted_costs_decide_without_measure(untimed):
    cheap = (operator(64, 4, 1), operator(4, 64, 3, 1))  # 4 to 4 channels at 3×3: a thirtieth of the multiplications
    form, report = planner.plan_chain(found(*cheap), X, 1e-5, measure=False)
    assert (report.choice, len(form)) == ("merge", 1)
    dear = (operator(4, 64, 3, 1), operator(64, 4, 3, 1))
    x = torch.randn(2, 64, 6, 6)
    form, report = planner.plan_chain(found(*dear), x, 1e-5, measure=False)
    assert (report.choice, len(form)) == ("keep", 2)
    assert all(candidate.milliseconds is None for candidate in report.candidates.values())


def test_counted_costs_are_multiplications_and_bytes():
    forms = {"keep": BLOCK, "merge": merge(BLOCK, (6, 6))}
    counted = planner.counted(forms, dict.fromkeys(forms, X))
    for name, form in forms.items():
        multiplications, moved = cost(form, X.shape, 4)
        assert counted[name] == multiplications + pricing.MULTIPLICATIONS_PER_BYTE * moved


def test_costly_operator_is_not_composed(untimed, monkeypatch):
    """Depthwise convolutions that one dense kernel would replace: 49 taps of 64×64 weights."""
    x = torch.randn(1, 64, 12, 12)
    chain = (operator(64, 64, 7, 3, groups=64), operator(64, 64, 1))
    monkeypatch.setattr(planner, "merge", None)
    form, report = planner.plan_chain(found(*chain), x, 1e-5, measure=False)
    assert report.choice == "keep"
    assert report.note == "one operator would cost more than 1.5 times as much"
    assert len(form) == 2


def test_promising_stretch_behind_an_unpromising_one(untimed):
    """An expansion and a depthwise convolution cost more as one; with the projection they cost less."""
    chain = (operator(32, 4, 1), operator(32, 32, 3, 1, groups=32), operator(4, 32, 1), operator(4, 4, 3, 1))
    form, report = planner.plan_chain(found(*chain), X, 1e-5, measure=False)
    assert report.choice == "split"
    assert [o.kernel for o in operators(form)] == [(3, 3), (3, 3)]
    equal(form, chain)


def test_pools_move_forward_where_that_is_cheaper(untimed):
    chain = (operator(4, 4, 3, 1), operator(4, 4, 1), operator(64, 4, 1), average(64, 6, 6), operator(8, 64, 1), Flatten())
    form, report = planner.plan_chain(found(*chain), X, 1e-5, measure=False)
    assert report.candidates[report.choice].multiplications < report.candidates["keep"].multiplications
    equal(form, chain)


def test_reordered_chain_is_a_candidate(priced):
    """Where nothing merges, moving the pool is what is left: the 3×3 convolution has its own padding."""
    priced(lambda form: len(operators(form)) + 10 * (not operators(form)[0].is_average))
    chain = (operator(64, 4, 1), average(64, 2, 2), operator(4, 64, 3, 1))
    form, report = planner.plan_chain(found(*chain), X, 1e-5)
    assert "reorder" in report.candidates
    assert report.choice == "reorder"
    equal(form, chain)


def test_flattened_layers_are_merged(priced):
    chain = (operator(8, 4, 6), operator(5, 8, 1), operator(3, 5, 1), Flatten())
    form, report = planner.plan_chain(found(*chain), X, 1e-5)
    assert report.choice in ("merge", "split")
    assert len(operators(form)) == 1
    assert form[-1] == Flatten()
    equal(form, chain)


def test_layers_are_merged(priced):
    layers = tuple(AffineOperator(torch.randn(o, i).double(), torch.randn(o).double()) for o, i in [(9, 4), (3, 9)])
    x = torch.randn(2, 5, 4)
    form, report = planner.plan_chain(found(*layers), x, 1e-5)
    assert (report.choice, len(form)) == ("merge", 1)
    equal(form, layers, x)


@pytest.mark.parametrize("shape", [(4, 6, 6), (1, 4, 6, 6)])
def test_chain_of_a_single_sample(untimed, shape):
    form, report = planner.plan_chain(found(*BLOCK), torch.randn(shape), 1e-5, measure=False)
    assert report.choice == "merge"
    equal(form, BLOCK, torch.randn(shape))


def test_measured_times_are_positive():
    _, report = planner.plan_chain(found(*BLOCK), X, 1e-5)
    assert all(candidate.milliseconds > 0 for candidate in report.candidates.values())
    assert report.candidates["keep"].multiplications == 2 * 36 * (48 + 9 * 12 + 48)


def test_errors_are_taken_without_tf32(priced, monkeypatch):
    seen = []

    def recorded(actual, expected):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return 0.0

    monkeypatch.setattr(chain_error, "relative_error", recorded)
    planner.plan_chain(found(*BLOCK), X, 1e-5)
    assert set(seen) == {"ieee"}
