"""What `fuse` returns is what was timed; the model itself is returned where nothing is faster by more than the noise."""

import pytest
import torch
from torch import nn

from fastentropy import fuse
from fastentropy.fusion import choosing, planner
from fastentropy.fusion.chains.elements import operators
from fastentropy.fusion.choosing import Race
from tests._helpers.fusing import assert_equal
from tests._helpers.networks import Reads

ORIGINAL, FUSED = ("original", "contiguous", "eager"), ("fused", "contiguous", "eager")


def order(samples):
    """Return the names of the forms in the order in which they are returned."""
    return [name for _, name in Race(dict.fromkeys(samples), samples, ()).best()]


@pytest.mark.parametrize(
    ("fused", "first"),
    [
        ([5, 5, 5, 5, 5], "fused"),
        ([9.9, 9.9, 9.9, 9.9, 9.9], "original"),  # less than two percent
        ([1, 1, 9, 12, 12], "original"),  # slower in two of five rounds
        ([9, 9, 9, 9, 40], "fused"),  # one round was disturbed
        ([11, 11, 11, 11, 11], "original"),
    ],
)
def test_another_form_must_be_faster_than_the_noise(fused, first):
    assert order({ORIGINAL: [10, 10, 10, 10, 10], FUSED: fused})[0] == first


def test_forms_are_compared_within_a_round():
    assert order({ORIGINAL: [1, 10, 100, 1000, 10000], FUSED: [0.9, 9, 90, 900, 9000]})[0] == "fused"


def test_faster_memory_format_of_the_model_is_the_baseline():
    last = ("original", "channels_last", "eager")
    race = Race(dict.fromkeys([ORIGINAL, last, FUSED]), {ORIGINAL: [10.0] * 5, last: [6.0] * 5, FUSED: [8.0] * 5}, ())
    assert next(iter(race.best().values())) == last


@pytest.fixture
def timed(monkeypatch):
    """The modules that `fuse` times, by entry. The fused form counts as the fastest, or the one named `timed.fastest`.

    A chain counts as faster the fewer operators it has.
    """

    class Timed(dict):
        fastest = "fused"

    timed = Timed()

    def measure_samples(functions, **options):
        timed.update({entry: call.func for entry, call in functions.items()})
        for call in functions.values():
            call()
        return {entry: [1.0 if entry[0] == timed.fastest else 2.0] * 5 for entry in functions}

    monkeypatch.setattr(choosing, "measure_samples", measure_samples)
    monkeypatch.setattr(planner, "measured", lambda forms, inputs: {key: len(operators(form)) for key, form in forms.items()})
    return timed


@pytest.mark.parametrize("fastest", ["original", "folded", "fused"])
def test_returned_module_was_timed(timed, fastest):
    timed.fastest = fastest
    layers = nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Linear(20, 3), nn.ReLU(), nn.Linear(3, 2)
    model, x = nn.Sequential(*layers).eval(), torch.randn(400, 6)
    fused = fuse(model, (x,))
    assert fused.report.choice == fastest
    assert any(fused is module for module in timed.values())
    assert_equal(fused, model, torch.randn(5, *x.shape[1:]))


def test_model_itself_is_returned_where_it_is_fastest(timed):
    timed.fastest = "original"
    model = Reads(lambda m, x: m.b(m.a(x)) if len(x) < 10 else m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    fused = fuse(model, (torch.randn(3, 4),))
    assert isinstance(fused.network, Reads)
    for batch in (3, 12):  # it takes the branches that were not traced, too
        x = torch.randn(batch, 4)
        assert torch.equal(fused(x), model(x))
    with torch.no_grad():
        model.a.weight.zero_()
    assert not torch.equal(fused(x), model(x))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 1), (5, 3, 4)])
@pytest.mark.parametrize("fastest", ["original", "folded", "fused"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_have_the_strides_of_the_model(timed, shape, fastest, memory_format):
    timed.fastest = fastest
    layers = nn.Conv2d(shape[0], 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)
    model = nn.Sequential(*layers).eval().to(memory_format=memory_format)
    x = torch.randn(4, *shape).to(memory_format=memory_format)
    fused, expected = fuse(model, (x,)), model(x)
    for module in timed.values():
        actual = module(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        long = [axis for axis in range(4) if expected.shape[axis] > 1]
        assert [actual.stride(axis) for axis in long] == [expected.stride(axis) for axis in long]
    assert fused(x).is_contiguous() == expected.is_contiguous()
