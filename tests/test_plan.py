"""The choice follows the measured times, among forms that are equal."""

import contextlib
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastentropy.fusion import plan
from fastentropy.fusion.affine import AffineOperator, Sum, merge, operators, run
from fastentropy.fusion.chains import FoundChain

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def operator(out_channels, in_channels, kernel, padding=0, groups=1):
    weight = torch.randn(out_channels, in_channels // groups, kernel, kernel, dtype=torch.float64)
    return AffineOperator(weight, torch.randn(out_channels).double(), (1, 1), (padding,) * 2, (1, 1), groups)


def found(*elements):
    return FoundChain(None, None, (), elements, tuple(f"conv{index}" for index in range(len(elements))))


def cost(chain):
    """A made-up price of a chain that is not just its number of operators."""
    return sum(1.0 + 0.001 * (o.weight.numel() % 97) for o in operators(chain))


@pytest.fixture
def priced(monkeypatch):
    """Every form costs what `cost` says; returns a way to set another price."""

    def set_price(price):
        monkeypatch.setattr(plan, "_time_forms", lambda forms, inputs: {key: price(form) for key, form in forms.items()})

    set_price(cost)
    return set_price


BLOCK = (operator(12, 4, 1), operator(12, 12, 3, 1, groups=12), operator(4, 12, 1))


def test_the_fastest_form_is_chosen(priced):
    chain, report = plan.plan_chain(found(*BLOCK), X, 1e-5)
    assert (report.choice, len(chain)) == ("merge", 1)
    assert set(report.candidates) == {"keep", "merge"}


@pytest.mark.parametrize(("merged", "choice"), [(0.97, "merge"), (0.99, "keep"), (1.5, "keep")])
def test_the_chain_is_kept_on_a_tie(priced, merged, choice):
    priced(lambda form: merged if len(operators(form)) == 1 else 1.0)
    assert plan.plan_chain(found(*BLOCK), X, 1e-5)[1].choice == choice


def test_the_split_is_the_cheapest_of_all_divisions(priced):
    chain = (*BLOCK, operator(4, 4, 3, 1), operator(8, 4, 1), operator(4, 8, 3, 1), operator(4, 4, 1))
    best = float("inf")
    for cuts in itertools.product([False, True], repeat=len(chain) - 1):
        bounds = [0, *(index + 1 for index, cut in enumerate(cuts) if cut), len(chain)]
        stretches = [chain[start:stop] for start, stop in itertools.pairwise(bounds)]
        try:
            best = min(best, cost([merge(s, (6, 6)) if len(s) > 1 else s[0] for s in stretches]))
        except ValueError:
            continue
    form, report = plan.plan_chain(found(*chain), X, 1e-5)
    assert report.choice == "split"
    assert cost(form) == pytest.approx(best)
    assert "inner zero padding" in report.note


def divisions(chain):
    """Every way to merge stretches of a chain, within the branches of its sums too."""
    if not chain:
        yield ()
    for stop in range(1, len(chain) + 1):
        heads = [chain[:1]] if stop == 1 else []
        if stop == 1 and isinstance(chain[0], Sum):
            heads = [(Sum(branches),) for branches in itertools.product(*map(list, map(divisions, chain[0].branches)))]
        with contextlib.suppress(ValueError):
            heads.append((merge(chain[:stop], (6, 6)),))
        yield from ((*head, *tail) for head in heads for tail in divisions(chain[stop:]))


@pytest.mark.parametrize("seed", range(4))
def test_the_split_reaches_into_sums_that_are_not_merged(priced, seed):
    torch.manual_seed(seed)
    long = (operator(6, 4, 1), operator(6, 6, 3, 1), operator(8, 6, 1), operator(4, 8, 3, 1))
    chain = (operator(4, 4, 1), Sum((long, ())), operator(5, 4, 1), operator(4, 5, 1))
    prices = {
        shape: random.Random(f"{seed}{shape}").uniform(1, 2) for shape in itertools.product(range(1, 9), range(1, 9), (1, 3, 5))
    }

    def price(form):
        return sum(prices[o.out_channels, o.in_channels, o.kernel[0]] for o in operators(form))

    priced(price)
    form, report = plan.plan_chain(found(*chain), X, 1e-5)
    assert report.choice == "split"
    assert price(form) == pytest.approx(min(map(price, divisions(chain))))
    torch.testing.assert_close(run(form, X.double()), run(chain, X.double()), rtol=1e-9, atol=1e-9)


def test_whatever_is_chosen_equals_the_chain(priced):
    for chain in (BLOCK, (*BLOCK, operator(4, 4, 3, 1)), (operator(4, 4, 3, 1), operator(6, 4, 1), operator(4, 6, 3, 1))):
        form, report = plan.plan_chain(found(*chain), X, 1e-5)
        torch.testing.assert_close(run(form, X.double()), run(chain, X.double()), rtol=1e-9, atol=1e-9)
        assert report.candidates[report.choice].relative_error <= 1e-5


def test_candidates_are_counted_by_operators_and_multiplications(priced):
    _, report = plan.plan_chain(found(Sum((BLOCK, ())), operator(4, 4, 1, groups=4)), X, 1e-5)
    counts = {name: (c.operators, c.multiplications) for name, c in report.candidates.items()}
    kept = 48 + 9 * 12 + 48 + 4
    assert counts == {"keep": (4, 2 * 36 * kept), "merge": (1, 2 * 36 * 9 * 16)}


@given(st.permutations(("keep", "merge", "split")))
def test_the_choice_is_the_fastest_measured_form(order):
    chain = (*BLOCK, operator(4, 4, 3, 1), operator(4, 4, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "merge", lambda chain, size: merged_by_force(chain))
        patch.setattr(plan, "_fastest_split", lambda kept, x: (merge(kept[:3], (6, 6)), *kept[3:]))
        patch.setattr(plan, "_time_forms", lambda forms, inputs: {name: 1.0 + order.index(name) for name in forms})
        form, report = plan.plan_chain(found(*chain), X, tolerance=float("inf"))
    assert report.choice == order[0]
    assert len(form) == {"keep": 5, "merge": 1, "split": 3}[order[0]]


def merged_by_force(chain):
    """One operator of the right sizes, whether exact or not."""
    return operator(chain[-1].out_channels, chain[0].in_channels, 3, 1)


def test_a_form_above_the_tolerance_is_not_chosen_and_named(priced, monkeypatch):
    wrong = operator(4, 4, 3, 1)
    monkeypatch.setattr(plan, "merge", lambda chain, size: wrong)
    _, report = plan.plan_chain(found(*BLOCK), X, 1e-5)
    assert report.choice == "keep"
    assert report.note == "above the tolerance of 1e-05: merge"


def test_a_single_operator_has_nothing_to_choose(priced):
    form, report = plan.plan_chain(found(operator(4, 4, 3, 1), operator(4, 4, 1, groups=4)), X, 1e-5)
    assert (len(form), report.candidates, report.choice) == (1, {}, "keep")


def test_measured_times_are_positive():
    _, report = plan.plan_chain(found(*BLOCK), X, 1e-5)
    assert all(candidate.milliseconds > 0 for candidate in report.candidates.values())
    assert report.candidates["keep"].multiplications == 2 * 36 * (48 + 9 * 12 + 48)


def test_relative_error_is_over_the_largest_expected_value():
    assert plan.relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 5.0])) == pytest.approx(0.1)
    assert plan.relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert plan.relative_error(torch.zeros(2), torch.zeros(2)) == 0
