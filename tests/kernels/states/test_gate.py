"""The activation times a gate: the bits of PyTorch's own product, its gradients, and the counts of the input alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastentropy_kernels import activation_states, activations, plan_activation_states
from fastentropy_kernels.states import reference
from tests._helpers.tensors import FUSED_DTYPES, INTEGER, assert_same, bits, random_values

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Multiplied in the pass that counts; multiplied there after PyTorch's function; the others.
ACTIVATIONS = ("relu", "silu", "gelu_tanh")


def zero_counts(neurons):
    return torch.zeros(neurons, 3, dtype=torch.int64)


def expected_counts(x, axis, mask=None):
    counts = zero_counts(x.shape[axis])
    reference.add_states(x, counts, axis, mask=mask)
    return counts


def packed(shape, dtype, seed):
    """Input and gate as slices of one tensor, as a layer that computes both returns them."""
    both = random_values((*shape[:-1], 2 * shape[-1]), dtype, seed)
    return both.chunk(2, dim=-1)


def apart(shape, dtype, seed):
    return random_values(shape, dtype, seed), random_values(shape, dtype, seed + 1)


LAYOUTS = {
    "tokens": ((3, 5, 37), 2, apart),
    "many tokens": ((2, 131, 1023), 2, apart),
    "one row": ((1, 1023), 1, apart),
    "one value": ((1, 1), 1, apart),
    "empty": ((0, 5), 1, apart),
    "packed": ((3, 5, 37), 2, packed),
    "planes": ((2, 5, 31, 33), 1, apart),
    "short planes": ((2, 5, 1, 3), 1, apart),
    "channels last": ((2, 37, 3, 5), 1, lambda *of: [t.to(memory_format=torch.channels_last) for t in apart(*of)]),
    "one channels last": ((2, 37, 3, 5), 1, lambda *of: [apart(*of)[0].to(memory_format=torch.channels_last), apart(*of)[1]]),
    "transposed": ((5, 37), 1, lambda *of: [t.t().contiguous().t() for t in apart(*of)]),
    "one transposed": ((5, 37), 1, lambda *of: [apart(*of)[0], apart(*of)[1].t().contiguous().t()]),
    "expanded gate": ((5, 37), 1, lambda *of: [apart(*of)[0], apart(*of)[1][:1].expand(of[0])]),
    "expanded input": ((5, 37), 1, lambda *of: [apart(*of)[0][:, :1].expand(of[0]), apart(*of)[1]]),
    "gaps": ((2, 5, 8, 6), 1, lambda *of: [t.repeat_interleave(2, -1)[..., ::2] for t in apart(*of)]),
    "negated": ((5, 37), 1, lambda *of: [torch._neg_view(t) for t in apart(*of)]),
    "gate is the input": ((5, 37), 1, lambda *of: [apart(*of)[0]] * 2),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_has_the_bits_of_pytorch(layout, dtype, impl, masked):
    shape, axis, tensors = LAYOUTS[layout]
    for seed, activation in enumerate(ACTIVATIONS):
        x, gate = tensors(shape, dtype, seed)
        before = bits(x), bits(gate)
        mask = torch.rand([*shape[:axis], *shape[axis + 1 :]]) > 0.5 if masked else None
        counts = zero_counts(shape[axis])
        y = activation_states(x, counts, activation, channel_axis=axis, mask=mask, gate=gate, impl=impl)
        assert torch.equal(bits(y), bits(activations.activate(x, activation) * gate))
        assert y.stride() == torch.empty_like(x).stride()
        assert torch.equal(counts, expected_counts(x, axis, mask))
        assert torch.equal(bits(x), before[0])
        assert torch.equal(bits(gate), before[1])


@settings(deadline=None, max_examples=30)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 37, 1023]),
    channels=st.sampled_from([1, 3, 16, 37, 1023, 2500]),
    gaps=st.tuples(st.sampled_from([0, 5]), st.sampled_from([0, 3])),
    activation=st.sampled_from(["identity", "relu", "relu6", "silu"]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_of_any_stride(rows, channels, gaps, activation, masked, seed):
    x = random_values((rows, gaps[0] + channels), torch.float32, seed)[:, gaps[0] :]
    gate = random_values((rows, gaps[1] + channels), torch.float32, seed + 1)[:, gaps[1] :]
    mask, counts = torch.rand(rows) > 0.5 if masked else None, zero_counts(channels)
    y = activation_states(x, counts, activation, mask=mask, gate=gate)
    assert torch.equal(bits(y), bits(activations.activate(x, activation) * gate))
    assert torch.equal(counts, expected_counts(x, 1, mask))


@pytest.mark.parametrize("activation", [name for name in activations.ACTIVATIONS if name != "prelu"])
def test_every_activation(activation):
    parameters = tuple(activations.ACTIVATIONS[activation].parameters.values())
    for dtype in (torch.float32, torch.float64):
        x, gate, counts = torch.randn(7, 5).to(dtype), torch.randn(7, 5).to(dtype), zero_counts(5)
        y = activation_states(x, counts, activation, gate=gate)
        assert torch.equal(y, activations.activate(x, activation, parameters) * gate)
        assert torch.equal(counts, expected_counts(x, 1))


def test_slopes_parameters_edges_and_nan():
    x, gate = random_values((7, 5), torch.float32), torch.randn(7, 5)
    weight, counts, nan = torch.randn(5), torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    y = activation_states(x, counts, "prelu", weight=weight, gate=gate, states="regions", nan=nan)
    assert torch.equal(bits(y), bits(torch.nn.functional.prelu(x, weight) * gate))
    assert torch.equal(nan, x.isnan().sum(0))
    assert torch.equal(counts, torch.stack([(x < 0).sum(0), (x >= 0).sum(0)], 1))
    y = activation_states(x, zero_counts(5), "leaky_relu", gate=gate, negative_slope=0.3)
    assert torch.equal(bits(y), bits(torch.nn.functional.leaky_relu(x, 0.3) * gate))


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    x, gate = random_values((4099, 37), torch.float32), random_values((4099, 37), torch.float32, 1)
    try:
        torch.set_num_threads(threads)
        for activation in ("relu", "silu"):
            counts = zero_counts(37)
            y = activation_states(x, counts, activation, gate=gate)
            assert torch.equal(bits(y), bits(activations.activate(x, activation) * gate))
            assert torch.equal(counts, expected_counts(x, 1))
    finally:
        torch.set_num_threads(before)


def test_flushed_subnormals():
    x, gate = torch.tensor([[1e-40, -1e-40, 0.0, 1e-30]]), torch.tensor([[1.0, 1.0, 1.0, 1e-10]])
    torch.set_flush_denormal(True)
    try:
        counts = zero_counts(4)
        assert torch.equal(activation_states(x, counts, "relu", gate=gate), torch.relu(x) * gate)
        assert plan_activation_states(x, counts, "relu", gate=gate) is None
    finally:
        torch.set_flush_denormal(False)
    assert counts.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "prelu"])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_equal_pytorch(needed, activation, dtype):
    x, gate = (torch.randn(7, 5).to(dtype).requires_grad_(needs) for needs in needed)
    weight = torch.randn(5).to(dtype).requires_grad_() if activation == "prelu" else None
    wanted = [tensor for tensor in (x, gate, weight) if tensor is not None and tensor.requires_grad]
    counts, grad = zero_counts(5), torch.randn(7, 5).to(dtype)
    function = activations.activate if weight is None else torch.nn.functional.prelu
    y = activation_states(x, counts, activation, weight=weight, gate=gate)
    expected = function(x, activation if weight is None else weight) * gate
    assert torch.equal(y, expected)
    assert_same(torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad))
    assert torch.equal(counts, expected_counts(x, 1))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2", "mish"])
def test_derivatives_of_second_order(activation):
    x, gate = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, gate):
        return activation_states(x, zero_counts(3), activation, gate=gate)

    assert torch.autograd.gradcheck(function, (x, gate))
    assert torch.autograd.gradgradcheck(function, (x, gate))


def test_operator_passes_opcheck():
    ops = torch.ops.fastentropy_kernels
    for needs_grad in (False, True):
        x, gate = (torch.randn(6, 5, requires_grad=needs_grad) for _ in range(2))
        opcheck(ops.activation_states, (x, "silu", [], None, 1, None, None, "auto", gate))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_compiled_full_graph(activation):
    compiled = torch.compile(activation_states, fullgraph=True, backend="aot_eager")
    x, gate, counts = random_values((6, 5), torch.float32), torch.randn(6, 5), zero_counts(5)
    y = compiled(x, counts, activation, gate=gate)
    assert torch.equal(bits(y), bits(activations.activate(x, activation) * gate))
    assert torch.equal(counts, expected_counts(x, 1))


class Named(torch.Tensor):
    """A tensor subclass."""


def test_gate_of_a_subclass_goes_through_the_operator():
    x, gate, counts = torch.randn(6, 5), torch.randn(6, 5), zero_counts(5)
    y = activation_states(x, counts, "silu", gate=gate.as_subclass(Named))
    assert type(y) is Named
    assert torch.equal(y.as_subclass(torch.Tensor), activations.activate(x, "silu") * gate)
    assert torch.equal(counts, expected_counts(x, 1))


# ---- plans


@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "layout", ["tokens", "many tokens", "one value", "planes", "short planes", "channels last", "transposed"]
)
def test_plan_equals_activation_states(layout, activation):
    shape, axis, tensors = LAYOUTS[layout]
    counts, buffer = zero_counts(shape[axis]), torch.zeros(3 * shape[axis] + 7, dtype=torch.int64)
    x, gate = tensors(shape, torch.float32, 0)
    plan = plan_activation_states(x, counts, activation, channel_axis=axis, gate=gate)
    assert not counts.any()  # making a plan counts nothing
    expected = zero_counts(shape[axis])
    for seed in range(3):
        x, gate = tensors(shape, torch.float32, seed)
        assert plan.fits(x, None, gate)
        expected += expected_counts(x, axis)
        y = plan(x, gate=gate)
        assert torch.equal(bits(y), bits(activations.activate(x, activation) * gate))
        assert y.stride() == x.stride()
        assert torch.equal(counts, expected)
        assert torch.equal(bits(plan(x, None, buffer, 7, gate)), bits(y))
    assert torch.equal(buffer[7:].view(-1, 3), expected)
    assert not buffer[:7].any()


def a_plan():
    x, gate = torch.randn(4, 6), torch.randn(4, 6)
    return plan_activation_states(x, zero_counts(6), "silu", gate=gate), x, gate


@pytest.mark.parametrize(
    "other",
    [
        None,
        torch.randn(5, 6),
        torch.randn(6, 4).t(),
        torch.randn(1, 6).expand(4, 6),
        torch.randn(4, 6).double(),
        torch.randn(4, 6).bfloat16(),
        torch.randn(4, 6, device="meta"),
        torch.randn(4, 6).as_subclass(Named),
        torch._neg_view(torch.randn(4, 6)),
        torch.randn(4, 6).to_sparse(),
        torch.randn(4, 6, requires_grad=True),
    ],
    ids=lambda x: "none" if x is None else f"{type(x).__name__} {x.dtype} {list(x.shape)} {x.device} {x.layout}",
)
def test_plan_does_not_fit_another_gate(other):
    plan, x, gate = a_plan()
    assert not plan.fits(x, None, other)
    assert plan.fits(x, None, gate)


def test_plan_without_a_gate_fits_none():
    x = torch.randn(4, 6)
    assert not plan_activation_states(x, zero_counts(6), "relu").fits(x, None, x)


def test_plan_does_not_fit_under_autocast():
    plan, x, gate = a_plan()
    with torch.autocast("cpu", torch.bfloat16):
        assert not plan.fits(x, None, gate)
    assert plan.fits(x, None, gate)


def test_no_plan_where_the_product_is_not_fused():
    x, counts = torch.randn(4, 6), zero_counts(6)
    for dtype in (*INTEGER, torch.float64):
        plan = plan_activation_states(x.to(dtype), counts, "relu", gate=x.to(dtype))
        assert (plan is None) == (dtype != torch.float32)
    for gate in (torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2]):
        assert plan_activation_states(x, counts, "silu", gate=gate) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", INTEGER, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((8, 64, 128), 2), ((2, 37, 3, 5), 1)], ids=str)
def test_plan_multiplies_on_a_gpu(shape, axis, dtype, masked):
    counts = zero_counts(shape[axis]).cuda()
    expected, plan = counts.clone(), None
    for seed in range(3):
        x, gate = (tensor.cuda() for tensor in apart(shape, dtype, seed))
        mask = torch.rand((*shape[:axis], *shape[axis + 1 :]), device="cuda") < 0.7 if masked else None
        plan = plan or plan_activation_states(x, counts, "silu", channel_axis=axis, mask=mask, gate=gate)
        assert plan.fits(x, mask, gate)
        y = plan(x, mask, gate=gate)
        alone = activation_states(x, expected, "silu", channel_axis=axis, mask=mask, impl="triton")
        assert torch.equal(bits(y), bits(alone * gate))
        assert torch.equal(counts, expected)
