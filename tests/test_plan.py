"""The choice follows the measured times, among forms that are equal."""

import itertools

import pytest
import torch

from fastentropy.fusion import plan
from fastentropy.fusion.affine import AffineOperator, merge, operators, run
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


def test_whatever_is_chosen_equals_the_chain(priced):
    for chain in (BLOCK, (*BLOCK, operator(4, 4, 3, 1)), (operator(4, 4, 3, 1), operator(6, 4, 1), operator(4, 6, 3, 1))):
        form, report = plan.plan_chain(found(*chain), X, 1e-5)
        torch.testing.assert_close(run(form, X.double()), run(chain, X.double()), rtol=1e-9, atol=1e-9)
        assert report.candidates[report.choice].relative_error <= 1e-5


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
