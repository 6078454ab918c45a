"""The measurements that `measure` makes of samples, with a clock that the tests control."""

import pytest

from fastentropy._utils import timing
from fastentropy.benchmarks.measurements import Case, Measurement, Quartiles, measure


@pytest.fixture
def clock(monkeypatch):
    """Return the seconds of a clock that operations advance."""
    now = [0.0]
    monkeypatch.setattr(timing, "_clock", lambda: now[0])
    return now


def operation(clock, *milliseconds):
    """Return an operation whose rounds take these milliseconds in turn, after two calls of a second each."""
    times = iter([1000.0, 1000.0, *milliseconds])

    def call():
        clock[0] += next(times) / 1e3

    return call


def raises(error):
    def call():
        raise error

    return call


def measured(case, **options):
    options = {"rounds": 3, "budget_seconds": 1e9, **options}
    return {each.operation: each for each in measure(case, **options)}


def test_quartiles_lie_between_the_samples():
    assert Quartiles.of([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert Quartiles.of([1, 2]) == (1.25, 1.5, 1.75)


@pytest.mark.parametrize(("other", "apart"), [((4, 5, 6), True), ((3, 5, 6), False), ((2, 2, 2), False), ((0, 0.1, 0.9), True)])
def test_quartiles_apart_from(other, apart):
    assert Quartiles(1, 2, 3).apart_from(Quartiles(*other)) is apart
    assert Quartiles(*other).apart_from(Quartiles(1, 2, 3)) is apart


def test_ratios_are_of_the_same_round(clock):
    """The machine gets slower in each round, which spreads the times but not the ratios."""
    case = Case("a case", {"one": operation(clock, 10, 20, 40), "two": operation(clock, 15, 30, 60)}, denominator="one")
    one, two = measured(case).values()
    assert two.milliseconds == pytest.approx((22.5, 30, 45))
    assert two.ratio == pytest.approx((1.5, 1.5, 1.5))
    assert one.ratio == pytest.approx((1, 1, 1))


def test_bandwidth_relative_to_the_roof(clock):
    operations = {"copy": operation(clock, 2, 2, 2), "half": operation(clock, 4, 4, 4), "unbound": operation(clock, 1, 1, 1)}
    case = Case("a case", operations, denominator="half", sizes={"copy": 10_000_000, "half": 10_000_000}, roof="copy")
    copy, half, unbound = measured(case).values()
    assert (copy.bytes, copy.gigabytes_per_second, copy.percent_of_roof) == (10_000_000, pytest.approx(5), pytest.approx(100))
    assert (half.gigabytes_per_second, half.percent_of_roof) == (pytest.approx(2.5), pytest.approx(50))
    assert (unbound.bytes, unbound.gigabytes_per_second, unbound.percent_of_roof) == (None, None, None)


def test_no_percentage_without_a_roof(clock):
    (one,) = measured(Case("a case", {"one": operation(clock, 2, 2, 2)}, denominator="one", sizes={"one": 1000})).values()
    assert one.gigabytes_per_second == pytest.approx(0.0005)
    assert one.percent_of_roof is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no compiler\nand a long trace"), "no compiler"),
        (RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: no compiler"), "InvalidCxxCompiler: no compiler"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_failing_baseline_is_skipped_with_its_reason(clock, error, reason):
    operations = {"baseline": raises(error), "ours": operation(clock, 1, 1, 1)}
    case = Case("a case", operations, denominator="ours", facts={"baseline": {"values": 3}}, baselines=frozenset({"baseline"}))
    ours, baseline = measure(case, rounds=3, budget_seconds=1)
    assert ours.milliseconds == pytest.approx((1, 1, 1))
    assert baseline == Measurement("a case", "baseline", facts={"values": 3}, skipped=reason)


def test_failing_operation_of_ours_is_not_skipped(clock):
    case = Case(
        "a case",
        {"ours": raises(RuntimeError("wrong")), "baseline": operation(clock)},
        "ours",
        baselines=frozenset({"baseline"}),
    )
    with pytest.raises(RuntimeError, match="wrong"):
        measured(case)


def test_interrupted_baseline_is_not_skipped(clock):
    case = Case("a case", {"baseline": raises(KeyboardInterrupt())}, "baseline", baselines=frozenset({"baseline"}))
    with pytest.raises(KeyboardInterrupt):
        measured(case)


def test_rounds_end_with_the_budget(clock):
    case = Case("a case", {"ours": operation(clock, *[100.0] * 5, *[9e9] * 20)}, denominator="ours")
    assert measured(case, rounds=25, budget_seconds=0.1)["ours"].milliseconds.upper == pytest.approx(100)


def test_measurement_survives_json():
    full = Measurement("a case", "ours", Quartiles(1, 2, 3), Quartiles(0.9, 1, 1.1), 8, 4.5, 91.0, {"values": 3})
    assert Measurement.from_dict(full.to_dict()) == full
    skipped = Measurement("a case", "baseline", skipped="no compiler")
    assert skipped.to_dict() == {"case": "a case", "operation": "baseline", "skipped": "no compiler"}
    assert Measurement.from_dict(skipped.to_dict()) == skipped
