"""How a rewritten network is compared with the network: on which inputs, on which outputs, by which error."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.verification import (
    OWN_ERROR_FACTOR,
    TOLERANCE,
    EquivalenceCheck,
    full_precision,
    judge,
    relative_error,
)
from tests._helpers.networks import Reads

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def everything(inputs):
    """Accept every size."""
    return True


def check(model, *inputs, takes=everything, tolerance=1e-5):
    return EquivalenceCheck(model, Inputs(inputs or (X,)), takes, tolerance)


def layer():
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval().requires_grad_(False)


def test_relative_error():
    assert relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 5.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -5.0])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor([1e-3]), torch.zeros(1)) > 1e30


@given(st.integers(0, 11), st.floats(1e-3, 10), st.integers(0, 99))
def test_difference_at_any_position(position, difference, seed):
    expected = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).double()
    actual = expected.clone()
    actual.view(-1)[position] += difference
    assert relative_error(actual, expected) == pytest.approx(difference / float(expected.abs().max()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value):
    odd, plain = torch.tensor([1.0, value]), torch.tensor([1.0, 2.0])
    assert relative_error(odd, odd.clone()) == 0
    assert relative_error(plain, odd) == math.inf
    assert relative_error(odd, plain) == math.inf
    assert relative_error(-odd, odd) == (2 if math.isnan(value) else math.inf)
    assert relative_error(torch.tensor([1.5, value]), odd) == pytest.approx(0.5)


def test_error_in_the_precision_of_the_expected_value():
    expected = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert 0 < relative_error(expected.float(), expected) < 1e-11
    assert relative_error(expected, expected.float()) == 0


def test_network_itself_has_no_error():
    model = layer()
    assert check(model).error(model) == 0


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_difference_at_any_batch_size(batch):
    model = layer()
    error = check(model).error(lambda x: model(x) + (len(x) == batch))
    assert error > 0.1


def test_difference_on_random_values():
    model = layer()
    assert check(model).error(lambda x: model(x) + (not torch.equal(x, X))) > 0.1
    assert check(model).error(lambda x: model(x) + torch.equal(x, X)) > 0.1


@pytest.mark.parametrize("wrong", range(3))
def test_difference_in_any_output(wrong):
    model = Reads(lambda m, x: {"first": x * 2, "rest": (x + 1, [x - 1])})

    def form(x):
        first, second, third = (y + (index == wrong) for index, y in enumerate((x * 2, x + 1, x - 1)))
        return {"first": first, "rest": (second, [third])}

    assert check(model).error(form) > 0.1


def test_largest_error_is_reported():
    model = Reads(lambda m, x: (x * 0 + 1, x * 0 + 1))
    error = check(model).error(lambda x: (x * 0 + 1.25, x * 0 + 1.5))
    assert error == pytest.approx(0.5)


def fails(x):
    raise RuntimeError("out of memory")


def fails_for_one(x):
    return layer()(x) if len(x) > 1 else fails(x)


@pytest.mark.parametrize("form", [fails, fails_for_one, lambda x: (layer()(x),) * 2, lambda x: ()])
def test_failing_form_has_infinite_error(form):
    assert check(layer()).error(form) == math.inf


@pytest.mark.parametrize("form", [lambda x: layer()(x)[:1], lambda x: layer()(x)[..., :2], lambda x: layer()(x)[None]])
def test_output_of_another_shape_has_infinite_error(form):
    assert check(layer()).error(form) == math.inf


def test_broadcastable_output_is_of_another_shape():
    model = Reads(lambda m, x: torch.ones_like(x))
    assert check(model).error(lambda x: torch.ones(1, 4)) == math.inf


def test_amplified_rounding_is_compared_in_float64():
    """Adding and taking away a large number leaves three digits in float32; the value itself is exact."""
    model = Reads(lambda m, x: x + 1e4 - 1e4)
    assert relative_error(model(X), X) > 1e-5
    assert check(model).error(lambda x: x.clone()) <= 1e-5
    assert check(model, tolerance=1e-12).error(model) == 0


def test_wrong_form_is_wrong_in_float64_too():
    model = Reads(lambda m, x: x + 1e4 - 1e4)
    assert check(model).error(lambda x: 1.01 * x) > 1e-3


def test_form_may_be_a_few_times_as_far_from_float64_as_the_model():
    model = Reads(lambda m, x: x + 1e4 - 1e4)
    own = relative_error(model(X).double(), X.double())
    assert own > 1e-5
    near, far = (check(model).judge(lambda x, times=times: x + times * own * x.abs().max()) for times in (3, 100))
    assert near.holds
    assert near.allowed >= OWN_ERROR_FACTOR * own
    assert not far.holds
    assert far.error == pytest.approx(100 * own, rel=0.1)


def test_each_output_has_a_bound_of_its_own():
    model = Reads(lambda m, x: (x + 1e4 - 1e4, x * 1))
    assert check(model).judge(lambda x: (x * 1.0001, x * 1)).holds
    judged = check(model).judge(lambda x: (x * 1, x * 1.0001))
    assert not judged.holds
    assert judged.error == pytest.approx(1e-4, rel=0.01)
    assert judged.bound == "the tolerance of 1e-05"


@given(st.floats(0, 10), st.one_of(st.floats(0, 10), st.sampled_from([math.inf, math.nan])), st.floats(1e-9, 1))
def test_judgement_of_an_error(error, own, tolerance):
    judged = judge(error, own, tolerance)
    assert judged.error == error
    scaled = OWN_ERROR_FACTOR * own if math.isfinite(own) else 0
    assert judged.holds == (error <= tolerance or error <= scaled)
    assert not judge(math.inf, own, tolerance).holds
    assert not judge(math.nan, own, tolerance).holds


def test_model_that_does_not_run_on_random_inputs():
    model = Reads(lambda m, x: x * 2 if torch.equal(x[:1], X[:1]) else fails(x))
    assert check(model).error(lambda x: x * 2) == 0
    assert check(model).error(lambda x: x * 3) > 0.1
    assert check(Reads(lambda m, x: fails(x))).error(lambda x: x) == math.inf


def test_numbers_of_outputs_that_depend_on_the_batch():
    model = Reads(lambda m, x: list(x.unbind()))
    assert check(model).error(lambda x: list(x.unbind())) == 0
    assert check(model).error(lambda x: [*x[:3].unbind(), *(x[3:] + 1).unbind()]) > 0.1


def test_model_that_does_not_run_in_float64():
    class Single(nn.Module):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return x * 2

    assert check(Single()).error(lambda x: 2.02 * x) == pytest.approx(0.01, rel=1e-3)


def test_model_stays_in_its_precision():
    model = layer()
    check(model).error(lambda x: model(x) + 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def seen_sizes(**options):
    sizes = []
    check(Reads(lambda m, x: sizes.append(tuple(x.shape)) or x), **options)
    return set(sizes)


def test_three_batch_sizes():
    assert {size[0] for size in seen_sizes()} == {1, 3, 4}


def test_only_accepted_sizes_are_tried():
    assert seen_sizes(takes=lambda inputs: inputs.args[0].shape != (4, 4)) == {(3, 4), (1, 4), (3, 5)}
    assert seen_sizes(takes=lambda inputs: False) == {(3, 4)}


def test_longer_inputs_where_all_sizes_are_free():
    assert (3, 5) in seen_sizes()
    assert (3, 5) not in seen_sizes(takes=lambda inputs: inputs.args[0].shape[1] == 4)


def test_sizes_that_the_model_refuses():
    model = Reads(lambda m, x: x * 2 if len(x) != 1 else fails(x))
    sizes = []
    assert check(model).error(lambda x: sizes.append(len(x)) or x * 2) == 0
    assert 1 not in sizes


def test_inputs_are_not_overwritten():
    before = X.clone()
    model = Reads(lambda m, x: x.mul_(2))
    assert check(model).error(model) == 0
    assert check(model).error(lambda x: x.mul_(2)) == 0
    assert torch.equal(X, before)


def test_inputs_that_are_no_floating_tensors():
    model = Reads(
        lambda m, x, ids, flag, scale: m.table(ids) + x * scale if flag else x, table=nn.Embedding(5, 4)
    ).requires_grad_(False)
    ids = torch.tensor([1, 2, 4])
    assert check(model, X, ids, True, 2.5).error(model) == 0
    assert check(model, X, ids, True, 2.5).error(lambda x, ids, flag, scale: model.table(ids) + x) > 0.1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tolerances_are_above_rounding(dtype):
    assert torch.finfo(dtype).eps < TOLERANCE[dtype] < 0.1


def precisions():
    return [backend.fp32_precision for backend in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]


def test_forms_are_compared_without_tf32():
    seen = []

    def forward(m, x):
        seen.append(precisions())
        return m.layer(x)

    before = precisions()
    check(Reads(forward, layer=layer())).error(layer())
    assert seen
    assert all(each == ["ieee", "ieee"] for each in seen)
    assert precisions() == before


def test_precision_is_restored_after_an_error():
    before = precisions()
    with pytest.raises(RuntimeError), full_precision():
        raise RuntimeError
    assert precisions() == before
    assert torch.backends.cudnn.allow_tf32 in (True, False)  # raises where the settings contradict each other
