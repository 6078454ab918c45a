"""A plan against `activation_states`, exactly: counts, the bits of the result, and when a plan does not fit."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastentropy_kernels import (
    ActivationPlan,
    activation_states,
    activations,
    count_states,
    plan_activation_states,
    plan_count_states,
)
from tests._helpers.tensors import INTEGER, bits, random_values

FUSED = ("identity", "relu", "relu6")


@pytest.fixture(autouse=True)
def settings_are_restored():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def counters(neurons, seed=0):
    """Counts that do not start from 0."""
    return torch.randint(-(2**40), 2**40, (neurons, 3), generator=torch.Generator().manual_seed(seed))


def laid_out(x, layout):
    """A copy of x in memory of another order, or with an offset."""
    if layout == "offset":
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    if layout == "channels last":
        return x.clone(memory_format=torch.channels_last)
    return (
        x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1) if layout == "transposed" else x.clone()
    )


LAYOUTS = {
    "rows": ((33, 37), 1),
    "one row": ((1, 1023), 1),
    "one value": ((1, 1), 1),
    "tokens": ((3, 5, 37), 2),
    "planes": ((2, 5, 1, 37), 1),
    "large planes": ((2, 3, 32, 33), 1),
    "unbatched": ((5, 7, 9), 0),
    "vector": ((37,), 0),
    "offset": ((5, 37), 1),
    "transposed": ((37, 5), 1),
    "channels last": ((2, 37, 3, 5), 1),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("dtype", INTEGER, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_equals_activation_states(layout, dtype, activation, inplace):
    shape, axis = LAYOUTS[layout]
    like = laid_out(random_values(shape, dtype), layout)
    counts, expected = counters(shape[axis]), counters(shape[axis])
    plan = plan_activation_states(like, counts, activation, channel_axis=axis, inplace=inplace)
    assert torch.equal(counts, expected)  # making a plan counts nothing
    for seed in range(3):
        values = random_values(shape, dtype, seed)
        x, again = laid_out(values, layout), laid_out(values, layout)
        assert plan.fits(x)
        y = plan(x)
        y_expected = activation_states(again, expected, activation, channel_axis=axis, inplace=inplace, impl="reference")
        assert torch.equal(counts, expected)
        assert torch.equal(bits(y), bits(y_expected))
        assert (y.dtype, y.shape, y.stride()) == (y_expected.dtype, y_expected.shape, y_expected.stride())
        assert (y is x) == inplace
        if not inplace:
            assert torch.equal(bits(x), bits(values))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 16, 37]), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(list(INTEGER)),
    activation=st.sampled_from(FUSED),
    inplace=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_order_of_the_axes(shape, data, dtype, activation, inplace, seed):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    x = random_values(shape, dtype, seed).permute(order)
    again, counts, expected = x.clone(), counters(x.shape[axis]), counters(x.shape[axis])
    y_expected = activation_states(again, expected, activation, channel_axis=axis, impl="reference")
    plan = plan_activation_states(x, counts, activation, channel_axis=axis, inplace=inplace)
    if plan is None:
        return  # it would be copied
    assert plan.fits(x)
    y = plan(x)
    assert torch.equal(counts, expected)
    assert torch.equal(bits(y), bits(y_expected))


def test_a_slice_of_rows_in_place():
    values = random_values((16, 40), torch.float32)
    memory = values.clone()
    x, counts, expected = memory[:, :37], counters(37), counters(37)
    plan = plan_activation_states(x, counts, "relu", inplace=True)
    assert plan.fits(x)
    plan(x)
    y_expected = activation_states(values[:, :37].clone(), expected, "relu", impl="reference")
    assert torch.equal(counts, expected)
    assert torch.equal(bits(memory[:, :37].clone()), bits(y_expected))
    assert torch.equal(bits(memory[:, 37:].clone()), bits(values[:, 37:].clone()))


@pytest.mark.parametrize("shape", [(4099, 37), (33, 5, 1023)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(shape, threads):
    torch.set_num_threads(threads)
    x = random_values(shape, torch.bfloat16)
    counts, expected = counters(shape[1]), counters(shape[1])
    plan = plan_activation_states(x, counts, "relu")
    for _ in range(3):
        y = plan(x)
        y_expected = activation_states(x, expected, "relu", impl="reference")
    assert torch.equal(counts, expected)
    assert torch.equal(bits(y), bits(y_expected))


def test_plans_take_turns():
    """Plans share the memory of a thread."""
    sites = []
    for index, shape in enumerate([(4, 3), (2, 1023), (2, 5, 37), (1, 1)]):
        x, counts = random_values(shape, torch.float32, index), counters(shape[1])
        sites.append((x, counts, counters(shape[1]), plan_activation_states(x, counts, "relu")))
    for x, _, expected, plan in 3 * sites:
        plan(x)
        activation_states(x, expected, "relu", impl="reference")
    assert all(torch.equal(counts, expected) for _, counts, expected, _ in sites)


@pytest.mark.parametrize("layout", ["rows", "planes", "one value"])
@pytest.mark.parametrize("threads", [1, 3])
def test_plan_with_other_counts(layout, threads):
    torch.set_num_threads(threads)
    shape, axis = LAYOUTS[layout]
    x = random_values(shape, torch.float32)
    first, second, expected = counters(shape[axis]), counters(shape[axis], 1), counters(shape[axis], 1)
    plan = plan_activation_states(x, first, "relu", channel_axis=axis)
    before, buffer = first.clone(), torch.cat([torch.full((7,), -1), second.flatten(), torch.full((2,), -1)])
    second = buffer[7:-2].view_as(second)
    assert plan.adds_to(buffer, 7)
    y = plan(x, None, buffer, 7)
    assert [*buffer[:7].tolist(), *buffer[-2:].tolist()] == [-1] * 9
    y_expected = activation_states(x, expected, "relu", channel_axis=axis, impl="reference")
    assert torch.equal(second, expected)
    assert torch.equal(bits(y), bits(y_expected))
    assert torch.equal(first, before)
    plan(x)
    assert torch.equal(first - before, second - counters(shape[axis], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "planes", "one value"])
@pytest.mark.parametrize("threads", [1, 3])
def test_plan_that_only_counts(layout, threads, dtype):
    torch.set_num_threads(threads)
    shape, axis = LAYOUTS[layout]
    first, second, expected = counters(shape[axis]), counters(shape[axis]), counters(shape[axis])
    plan = plan_count_states(random_values(shape, dtype), first, channel_axis=axis)
    assert torch.equal(first, expected)
    for seed in range(3):
        x = random_values(shape, dtype, seed).requires_grad_(seed > 0)
        before, version = x.detach().clone(), x._version
        assert plan.fits(x)
        assert plan(x) is None
        plan(x, None, second)
        count_states(x, expected, channel_axis=axis, impl="reference")
        assert torch.equal(bits(x), bits(before))
        assert x._version == version
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_no_plan_counts_what_a_kernel_cannot_count_in_place():
    for x in (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(0, 3), torch.zeros(1, 3).expand(4, 3)[:, ::2]):
        assert plan_count_states(x, torch.zeros(x.shape[1], 3, dtype=torch.int64)) is None
    x, counts = torch.zeros(2, 3), torch.zeros(3, 3, dtype=torch.int64)
    assert plan_count_states(x, counts, mask=torch.ones(2, dtype=torch.bool)) is None
    assert not plan_count_states(x, counts).fits(torch.zeros(2, 4))


def test_plan_keeps_its_counts_alive():
    x = torch.ones(2, 3)
    counts = torch.zeros(3, 3, dtype=torch.int64)
    plan, view = plan_activation_states(x, counts, "relu"), counts.view(9)
    del counts
    for _ in range(20):
        torch.full((3, 3), -1)
        plan(x)
    assert view.view(3, 3)[:, 2].tolist() == [40] * 3


@pytest.mark.slow
def test_flushed_subnormals_are_counted():
    x = torch.tensor([[1e-40, -1e-40, 0.0, 1.0]])
    torch.set_flush_denormal(True)
    counts = torch.zeros(4, 3, dtype=torch.int64)
    plan = plan_activation_states(x, counts, "relu")
    assert plan.fits(x)
    plan(x)
    torch.set_flush_denormal(False)
    assert counts.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


# ---- when a plan fits


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def a_plan(inplace=False):
    x = torch.randn(4, 6)
    return plan_activation_states(x, torch.zeros(6, 3, dtype=torch.int64), "relu", inplace=inplace), x


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        torch.randn(6),
        torch.randn(5, 6),
        torch.randn(4, 7),
        torch.randn(6, 4),
        torch.randn(4, 6, 1),
        torch.randn(2, 2, 6),
        torch.randn(0, 6),
        torch.randn(6, 4).t(),
        torch.randn(4, 7)[:, :6],
        torch.randn(1, 6).expand(4, 6),
        torch.randn(4, 6).double(),
        torch.randn(4, 6).half(),
        torch.randn(4, 6).bfloat16(),
        torch.ones(4, 6, dtype=torch.int32),
        torch.randn(4, 6, device="meta"),
        torch.randn(4, 6).as_subclass(_Subclass),
        nn.Parameter(torch.randn(4, 6)),
        torch._neg_view(torch.randn(4, 6)),
        torch.randn(4, 6).to_sparse(),
    ],
    ids=lambda x: f"{type(x).__name__} {x.dtype} {list(x.shape)} {x.device} {x.layout}",
)
def test_does_not_fit_other_tensors(other, inplace):
    plan, x = a_plan(inplace)
    assert not plan.fits(other)
    assert plan.fits(x)


def test_fits_tensors_alike():
    plan, _ = a_plan()
    assert plan.fits(torch.randn(5, 6)[1:])
    assert plan.fits(torch.randn(6, 4).t().contiguous())


def test_does_not_fit_other_numbers_of_threads():
    plan, x = a_plan()
    torch.set_num_threads(2)
    assert not plan.fits(x)
    torch.set_num_threads(1)
    assert plan.fits(x)


def test_does_not_fit_once_subnormals_are_flushed():
    plan, x = a_plan()
    torch.set_flush_denormal(True)
    assert not plan.fits(x)
    torch.set_flush_denormal(False)
    assert plan.fits(x)


def test_does_not_fit_once_subnormals_are_kept():
    torch.set_flush_denormal(True)
    plan, x = a_plan()
    assert plan.fits(x)
    torch.set_flush_denormal(False)
    assert not plan.fits(x)


@pytest.mark.parametrize("context", [_Mode, forward_ad.dual_level])
def test_does_not_fit_in_a_mode(context):
    plan, x = a_plan()
    with context():
        assert not plan.fits(x)
    assert plan.fits(x)


def test_does_not_fit_while_tracing():
    plan, x = a_plan()
    fits = []

    def function(x):
        fits.append(plan.fits(x))
        return x + 1

    torch.jit.trace(function, (x,), check_trace=False)
    assert fits == [False]
    assert plan.fits(x)


def test_does_not_fit_fake_tensors():
    plan, x = a_plan()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not plan.fits(fake)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_does_not_fit_in_a_transform(transform):
    plan, x = a_plan()
    fits = []

    def function(x):
        fits.append(plan.fits(x))
        return x.sum()

    transform(function)(torch.randn(3, 4, 6) if transform is torch.func.vmap else x)
    assert fits == [False]


def test_does_not_fit_where_a_gradient_is_required():
    """`activation_states` would record a gradient."""
    plan, x = a_plan()
    needs_gradient = x.clone().requires_grad_()
    assert not plan.fits(needs_gradient)
    with torch.no_grad():
        assert plan.fits(needs_gradient)


# ---- when there is no plan


@pytest.mark.parametrize("activation", ["gelu", "silu", "leaky_relu", "hardtanh", "softplus"])
def test_no_plan_for_unfused_activations(activation):
    assert plan_activation_states(torch.randn(4, 6), counters(6), activation) is None


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 6).expand(4, 6),
        torch.randn(4, 1).expand(4, 6),
        torch.randn(0, 6),
        torch.randn(4, 6, 0),
        torch.randn(4, 6).double(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(4, 6, 5, 5)[:, :, 1:, 1:],
        torch.randn(4, 7)[:, :6],  # y has other strides
    ],
    ids=lambda x: f"{x.dtype} {list(x.shape)} {x.stride()}",
)
def test_no_plan_for_tensors_that_are_copied(x):
    counts = counters(6)
    assert plan_activation_states(x, counts, "relu") is None
    assert torch.equal(counts, counters(6))


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((torch.randn(4, 6), counters(5), "relu"), {}, ValueError),
        ((torch.randn(4, 6), counters(6).int(), "relu"), {}, (TypeError, ValueError)),
        ((torch.randn(4, 6), counters(6)[:, :2], "relu"), {}, ValueError),
        ((torch.randn(4, 6), counters(6), "unknown"), {}, ValueError),
        ((torch.randn(4, 6), counters(6), "relu"), {"slope": 1.0}, TypeError),
        ((torch.randn(4, 6), counters(6), "relu"), {"channel_axis": 2}, ValueError),
        ((torch.ones(4, 6).int(), counters(6), "relu"), {}, TypeError),
        ((torch.randn(4, 6, requires_grad=True), counters(6), "relu"), {"inplace": True}, ValueError),
        ((torch.randn(1, 6).expand(4, 6), counters(6), "relu"), {"inplace": True}, ValueError),
    ],
)
def test_errors_are_those_of_activation_states(arguments, options, error):
    with pytest.raises(error) as expected:
        activation_states(*arguments, **options)
    with pytest.raises(type(expected.value)) as raised:
        plan_activation_states(*arguments, **options)
    assert str(raised.value) == str(expected.value)


# ---- modes and versions


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("made", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("used", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_made_in_one_mode_and_used_in_another(made, used, inplace):
    counts, expected = counters(6), counters(6)
    with made():
        plan = plan_activation_states(torch.randn(4, 6), counts, "relu", inplace=inplace)
    with used():
        x = torch.randn(4, 6)
        y_expected = activation_states(x.clone(), expected, "relu", impl="reference")
        assert plan.fits(x)
        y = plan(x)
        assert torch.equal(y, y_expected)
        assert y.is_inference() == (used is torch.inference_mode)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_versions_of_written_tensors(inplace):
    counts, x = counters(6), torch.randn(4, 6)
    plan = plan_activation_states(x, counts, "relu", inplace=inplace)
    versions = counts._version, x._version
    plan(x)
    assert counts._version == versions[0] + 1
    assert x._version == versions[1] + inplace


def test_versions_with_other_counts():
    counts, others, x = counters(6), counters(6), torch.randn(4, 6)
    for plan in (plan_activation_states(x, counts, "relu", inplace=True), plan_count_states(x, counts)):
        versions = counts._version, others._version, x._version
        plan(x, None, others)
        assert (counts._version, others._version) == versions[:2]
        assert x._version == versions[2] + isinstance(plan, ActivationPlan)


def test_in_place_in_inference_mode():
    counts, x = counters(6), torch.randn(4, 6)
    plan = plan_activation_states(x, counts, "relu", inplace=True)
    with torch.inference_mode():
        inside = torch.randn(4, 6)
        plan(inside)
    activated = activations.activate(inside.clone(), "relu")
    assert torch.equal(inside, activated)


def test_backward_detects_overwritten_tensors():
    x = torch.randn(4, 6, requires_grad=True)
    y = torch.exp(x)
    plan = plan_activation_states(y.detach(), counters(6), "relu", inplace=True)
    plan(y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_result_requires_no_gradient():
    plan, x = a_plan()
    assert not plan(x).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("dtype", INTEGER, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 37), 2), ((8, 64, 129), 2), ((2, 37, 3, 5), 1), ((33, 37), 1)], ids=str)
def test_plan_equals_activation_states_on_a_gpu(shape, axis, dtype, activation, inplace, masked):
    positions = (*shape[:axis], *shape[axis + 1 :])
    counts = counters(shape[axis]).cuda()
    expected = counts.clone()
    options = {"channel_axis": axis, "inplace": inplace}
    plan = None
    for seed in range(3):
        x = random_values(shape, dtype, seed).cuda()
        again = x.clone()
        mask = torch.rand(positions, device="cuda") < 0.7 if masked else None
        if plan is None:
            plan = plan_activation_states(x, counts, activation, mask=mask, **options)
            assert torch.equal(counts, expected)  # making a plan counts nothing
        assert plan.fits(x, mask)
        assert not plan.fits(x, None if masked else torch.ones(positions, dtype=torch.bool, device="cuda"))
        y = plan(x, mask)
        y_expected = activation_states(again, expected, activation, mask=mask, **options, impl="triton")
        assert torch.equal(counts, expected)
        assert torch.equal(bits(y), bits(y_expected))
        assert (y is x) == inplace


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_plan_on_a_gpu_needs_aligned_memory():
    memory = torch.randn(4 * 8 + 1, device="cuda")
    counts = counters(8).cuda()
    assert plan_activation_states(memory[1:].view(4, 8), counts, "relu") is None
    plan = plan_activation_states(memory[:-1].view(4, 8), counts, "relu")
    assert plan.fits(torch.randn(4, 8, device="cuda"))
    assert not plan.fits(memory[1:].view(4, 8))
    assert not plan.fits(torch.randn(4, 8))
