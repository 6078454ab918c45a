"""The public functions in every implementation that runs here: activations, their gradients, states, masks and NaN."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastentropy_kernels
from fastentropy_kernels import activation_states, activations, count_states, linear_regions
from fastentropy_kernels.states import ops
from tests._helpers.tensors import FUSED_DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IMPLEMENTATIONS = [
    ("cpu", "auto"),
    ("cpu", "numba"),
    ("cpu", "reference"),
    pytest.param(("cuda", "triton"), marks=pytest.mark.gpu),
    pytest.param(("cuda", "reference"), marks=pytest.mark.gpu),
]
# Dtype -> relative and absolute tolerance. On a CPU, activations are PyTorch's own or exact. Triton's are computed in float32
# and rounded once.
TRITON_TOLERANCE = {torch.float16: (2**-10, 1e-6), torch.bfloat16: (2**-7, 1e-6), torch.float32: (1e-6, 1e-6)}


@pytest.fixture(scope="module", params=IMPLEMENTATIONS, ids=lambda param: "-".join(param))
def where(request):
    """A device, and an implementation that runs on it."""
    if request.param[0] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def quick_gelu(x):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


PYTORCH = {
    "identity": torch.clone,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "prelu": F.prelu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": quick_gelu,
}
CASES = [
    *((name, {}) for name in PYTORCH),
    ("leaky_relu", {"negative_slope": 0.3}),
    ("leaky_relu", {"negative_slope": -2}),
    ("elu", {"alpha": 0.7}),
    ("celu", {"alpha": 2.5}),
    ("softplus", {"beta": 2.0}),
    ("softplus", {"threshold": 1.5}),
    ("softplus", {"beta": 0.5, "threshold": 3}),
    ("hardtanh", {"min_val": -0.1, "max_val": 1.7}),
    ("hardtanh", {"max_val": 0}),
]
TIES = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1.0, -1.0, 1.5, 1.7, -0.1]
SPECIAL = [math.nan, math.inf, -math.inf, 1e-45, -1e-45, 7e-6, -7e-6, 100.0, -100.0, *TIES]

each_case = pytest.mark.parametrize(("activation", "parameters"), CASES, ids=str)


def random_values(shape, special=SPECIAL, dtype=torch.float32, device="cpu"):
    """Normal values. About one in three is one of `special`."""
    chosen = torch.tensor(special)[torch.randint(len(special), shape)]
    return torch.where(torch.rand(shape) < 0.3, chosen, torch.randn(shape) * 3).to(dtype).to(device)


def slopes(activation, neurons, x):
    """The weight of prelu as a keyword argument; none for other activations."""
    return {"weight": torch.randn(neurons).to(x)} if activation == "prelu" else {}


def zero_counts(neurons, states=3, device="cpu"):
    return torch.zeros(neurons, states, dtype=torch.int64, device=device)


def oracle(x, channel_axis=1, edges=None, mask=None):
    """Counts [neurons, states] and NaN [neurons], by numpy.digitize in float64, one neuron at a time."""
    counts, nan = [], []
    for values in x.detach().cpu().double().movedim(channel_axis, 0):
        values = (values if mask is None else values[mask.cpu()]).numpy().ravel()
        numbers = values[~np.isnan(values)]
        columns = np.sign(numbers).astype(int) + 1 if edges is None else np.digitize(numbers, edges)
        counts.append(np.bincount(columns, minlength=3 if edges is None else len(edges) + 1))
        nan.append(values.size - numbers.size)
    return torch.tensor(np.array(counts)), torch.tensor(nan)


def test_every_activation_is_compared():
    assert PYTORCH.keys() == activations.ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_activation_equals_pytorch(activation, parameters, dtype, where):
    device, impl = where
    impl = "auto" if dtype == torch.float64 else impl
    rtol, atol = TRITON_TOLERANCE[dtype] if impl == "triton" else (0, 0)
    x = random_values((37, 5), dtype=dtype, device=device)
    weight = slopes(activation, 5, x)
    y = activation_states(x, zero_counts(5, device=device), activation, impl=impl, **weight, **parameters)
    torch.testing.assert_close(y, PYTORCH[activation](x, **weight, **parameters), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("shape", [(7, 5), (4, 5, 6), (3, 4, 5, 6), (5,)], ids=str)
@pytest.mark.parametrize("slope", ["one", "each", "strided", "expanded"])
def test_prelu_slopes_along_any_axis(slope, shape, where):
    device, impl = where
    for axis in range(-len(shape), len(shape)):
        x, neurons = random_values(shape, device=device), shape[axis]
        weight = {
            "one": torch.randn(1),
            "each": torch.randn(neurons),
            "strided": torch.randn(neurons, 3)[:, 1],
            "expanded": torch.randn(1).expand(neurons),
        }[slope].to(device)
        counts = zero_counts(neurons, device=device)
        y = activation_states(x, counts, "prelu", channel_axis=axis, weight=weight, impl=impl)
        expected = torch.stack([F.prelu(x.select(axis, i), weight[i % len(weight)].view(1)) for i in range(neurons)], axis)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_clipping_activations_on_images(masked, memory_format, activation, dtype, where):
    device, impl = where
    for shape in [(3, 5, 1, 1), (2, 5, 7, 7), (1, 37, 5, 6), (2, 3, 33, 31), (1, 1, 100, 100)]:
        x = random_values(shape, dtype=dtype, device=device).to(memory_format=memory_format)
        mask = torch.rand(shape[0], *shape[2:], device=device) > 0.5 if masked else None
        counts, expected = oracle(x, mask=mask)[0], PYTORCH[activation](x)
        for inplace in (False, True):
            ours = zero_counts(shape[1], device=device)
            y = activation_states(x, ours, activation, mask=mask, inplace=inplace, impl=impl)
            assert torch.equal(ours.cpu(), counts)
            assert (y is x) == inplace
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_identity_returns_a_new_tensor(where):
    device, impl = where
    x = torch.randn(6, 5, device=device)
    y = activation_states(x, zero_counts(5, device=device), "identity", impl=impl)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_each_state(activation, dtype, where):
    device, impl = where
    impl = "auto" if dtype == torch.float64 else impl
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    columns = {
        "off": ([-math.inf, -1, -smallest], [3, 0, 0], 0),
        "zero": ([0.0, -0.0, 0.0], [0, 3, 0], 0),
        "on": ([math.inf, 1, smallest], [0, 0, 3], 0),
        "NaN": ([math.nan, -math.nan, 1], [0, 0, 1], 2),
    }
    x = torch.tensor([values for values, *_ in columns.values()], dtype=torch.float64).T.to(dtype).to(device)
    counts, nan = torch.full((4, 3), 100, device=device), torch.full((4,), 100, device=device)
    if activation is None:
        count_states(x, counts, nan=nan, impl=impl)
    else:
        activation_states(x, counts, activation, nan=nan, impl=impl)
    assert (counts - 100).tolist() == [expected for _, expected, _ in columns.values()]
    assert (nan - 100).tolist() == [expected for *_, expected in columns.values()]


# Numbers that formats of 16 or 32 bits round to a neighbour, to zero or to infinity, and some that they represent.
HARD_EDGES = [-math.inf, -1e300, -6.0000001, -1, -0.1, -1e-50, -0.0, 1e-50, 0.1, 1, 3.0000001, 6, 65520, 3.4028236e38, math.inf]
edges_to_draw = st.sets(st.sampled_from(HARD_EDGES) | st.floats(-7, 7, width=16), min_size=1, max_size=15).map(sorted)


def around(edges, dtype):
    """Each edge rounded to the dtype, and its two neighbours."""
    middle = torch.tensor(edges, dtype=torch.float64).to(dtype)
    infinity = torch.full_like(middle, math.inf)
    return torch.cat([middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)])


@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, "relu", pytest.param("silu", marks=pytest.mark.slow)])
@settings(max_examples=40)
@given(
    edges=st.none() | edges_to_draw,
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(61, 5), (4, 5, 33), (2, 5, 3, 3)]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_states_equal_digitize(where, activation, edges, dtype, shape, masked, seed):
    torch.manual_seed(seed)
    special = torch.cat([around(edges or [0.0], dtype), torch.tensor(SPECIAL).to(dtype)])
    x = special[torch.randint(len(special), shape)]
    mask = torch.rand(shape[0], *shape[2:]) > 0.5 if masked else None
    expected, expected_nan = oracle(x, 1, edges, mask)
    device, impl = where
    impl = "auto" if dtype == torch.float64 else impl
    x, mask = x.to(device), None if mask is None else mask.to(device)
    start = torch.randint(-(2**40), 2**40, expected.shape, device=device)
    counts, nan = start.clone(), start[:, 0].clone()
    if activation is None:
        count_states(x, counts, mask=mask, nan=nan, edges=edges, impl=impl)
    else:
        activation_states(x, counts, activation, mask=mask, nan=nan, edges=edges, impl=impl)
    assert torch.equal((counts - start).cpu(), expected)
    assert torch.equal((nan - start[:, 0]).cpu(), expected_nan)


@pytest.mark.parametrize("edges", [torch.tensor([0.1, 2.0], dtype=torch.float64), np.array([0.1, 2]), (0.1, 2), [0.1, 2]])
def test_edges_of_any_sequence_type(edges):
    counts = zero_counts(1, 3)
    count_states(torch.tensor([[0.0], [0.1], [2.0], [3.0]]), counts, edges=edges)
    assert counts.tolist() == [[1, 1, 2]]


REGIONS = {
    "relu": ({}, (0,)),
    "relu6": ({}, (0, 6)),
    "leaky_relu": ({"negative_slope": 0.2}, (0,)),
    "hardswish": ({}, (-3, 3)),
    "hardtanh": ({"min_val": -0.1, "max_val": 2}, (-0.1, 2)),
    "relu2": ({}, (0,)),
    "prelu": ({}, (0,)),
}


@pytest.mark.parametrize("activation", REGIONS)
def test_counts_of_regions(activation, where):
    device, impl = where
    parameters, edges = REGIONS[activation]
    assert linear_regions(activation, **parameters) == edges
    x = torch.cat([around(edges, torch.float32), torch.tensor(SPECIAL)])[:, None].repeat(3, 4).to(device)
    counts = zero_counts(4, len(edges) + 1, device)
    weight = slopes(activation, 4, x)
    activation_states(x, counts, activation, states="regions", impl=impl, **weight, **parameters)
    assert torch.equal(counts.cpu(), oracle(x, edges=edges)[0])


def test_bounds_of_hardswish_count_as_the_region_above():
    counts = zero_counts(1)
    x = torch.tensor([[-3.0000002], [-3.0], [2.9999998], [3.0], [math.nan]])
    activation_states(x, counts, "hardswish", states="regions")
    assert counts.tolist() == [[1, 2, 1]]


def test_smooth_activations_have_no_regions():
    for activation in activations.ACTIVATIONS.keys() - REGIONS:
        with pytest.raises(ValueError, match=f"activation: {activation} has no linear regions, expected one of relu, "):
            linear_regions(activation)


@pytest.mark.parametrize("activation", ["identity", "relu6", "mish"])
def test_masked_positions_are_only_activated(activation, where):
    device, impl = where
    x, counts = random_values((6, 5, 7), device=device), zero_counts(5, device=device)
    nan = counts[:, 0].clone()
    mask = torch.zeros(6, 7, dtype=torch.bool, device=device)
    y = activation_states(x, counts, activation, mask=mask, nan=nan, impl=impl)
    assert not counts.any()
    assert not nan.any()
    rtol, atol = TRITON_TOLERANCE[torch.float32] if impl == "triton" else (0, 0)
    torch.testing.assert_close(y, PYTORCH[activation](x), rtol=rtol, atol=atol, equal_nan=True)


# Relative and absolute. Autograd sums the gradient of the product in quick_gelu in another order.
QUICK_GELU_TOLERANCE = {
    torch.float16: (2**-10, 1e-6),
    torch.bfloat16: (2**-7, 1e-6),
    torch.float32: (1e-6, 1e-6),
    torch.float64: (1e-15, 1e-15),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_gradient_equals_pytorch(activation, parameters, dtype, where):
    device, impl = where
    impl = "auto" if dtype == torch.float64 else impl
    rtol, atol = QUICK_GELU_TOLERANCE[dtype] if activation == "quick_gelu" else (0, 0)
    x = random_values((37, 5), TIES, dtype, device).requires_grad_()
    weight = {name: value.requires_grad_() for name, value in slopes(activation, 5, x.detach()).items()}
    counts = zero_counts(5, device=device)
    y = activation_states(x, counts, activation, impl=impl, **weight, **parameters)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *weight.values()], grad)
    theirs = torch.autograd.grad(PYTORCH[activation](x, **weight, **parameters), [x, *weight.values()], grad)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    assert torch.equal(counts.cpu(), oracle(x)[0])


@each_case
def test_gradient_equals_finite_differences(activation, parameters):
    x = torch.rand(4, 3, dtype=torch.float64) * 16 - 8
    near_a_kink = ((x[..., None] - torch.tensor(TIES, dtype=x.dtype)).abs() < 1e-3).any(-1)
    x = (x + 0.01 * near_a_kink).requires_grad_()
    weight = {name: value.requires_grad_() for name, value in slopes(activation, 3, x.detach()).items()}

    def function(x, *weight):
        return activation_states(x, zero_counts(3), activation, **dict(zip(["weight"], weight, strict=False)), **parameters)

    assert torch.autograd.gradcheck(function, (x, *weight.values()))


@each_case
def test_second_derivative_equals_pytorch(activation, parameters):
    x = random_values((7, 5), TIES, torch.float64).requires_grad_()
    weight = slopes(activation, 5, x.detach())
    second = []
    for y in (
        activation_states(x, zero_counts(5), activation, **weight, **parameters),
        PYTORCH[activation](x, **weight, **parameters),
    ):
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        second += torch.autograd.grad((first**2).sum(), x)
    torch.testing.assert_close(*second, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("axis", range(-4, 4))
@pytest.mark.parametrize("slope", ["one", "each"])
def test_gradient_of_prelu_slopes_along_any_axis(slope, axis):
    x = random_values((3, 4, 5, 6), TIES, torch.float64).requires_grad_()
    weight = torch.randn(1 if slope == "one" else x.shape[axis], dtype=torch.float64, requires_grad=True)
    y = activation_states(x, zero_counts(x.shape[axis]), "prelu", channel_axis=axis, weight=weight)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, weight], grad)
    expected = torch.autograd.grad(F.prelu(x.movedim(axis, 1), weight), [x, weight], grad.movedim(axis, 1))
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("needed", ["x", "weight", "neither"])
def test_gradient_only_where_required(needed):
    x, weight = torch.randn(4, 5, requires_grad=needed == "x"), torch.randn(5, requires_grad=needed == "weight")
    y = activation_states(x, zero_counts(5), "prelu", weight=weight)
    assert y.requires_grad == (needed != "neither")
    if y.requires_grad:
        assert "fastentropy_kernels" in y.grad_fn.name()
        y.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (needed == "x", needed == "weight")


def test_backward_counts_nothing(where):
    device, impl = where
    x = random_values((8, 5), TIES, device=device).requires_grad_()
    counts, nan = zero_counts(5, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    y = activation_states(x, counts, "gelu", nan=nan, impl=impl)
    once = counts.clone()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert torch.equal(counts, once)
    assert torch.equal(counts.cpu(), oracle(x)[0])
    assert not counts.requires_grad
    assert not nan.requires_grad


def test_counts_have_no_gradient(where):
    device, impl = where
    x = random_values((8, 5), device=device).requires_grad_()
    counts = zero_counts(5, device=device)
    count_states(x, counts, impl=impl)
    assert torch.equal(counts.cpu(), oracle(x)[0])
    assert not counts.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_no_operator_without_a_gradient(activation, mode, where, monkeypatch):
    device, impl = where
    monkeypatch.setattr(ops, "activation_states", None)
    x = torch.nn.Parameter(random_values((8, 5), device=device))
    counts = zero_counts(5, device=device)
    with mode():
        y = activation_states(x, counts, activation, impl=impl)
    assert type(y) is torch.Tensor
    assert not y.requires_grad
    assert torch.equal(counts.cpu(), oracle(x)[0])


def test_counts_add_up_over_calls(where):
    device, impl = where
    counts, nan = zero_counts(5, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    batches = [random_values((size, 5), device=device) for size in (1, 7, 64, 0)]
    for batch in batches:
        activation_states(batch, counts, "relu", nan=nan, impl=impl)
        count_states(batch, counts, nan=nan, impl=impl)
    expected, expected_nan = oracle(torch.cat(batches))
    assert torch.equal(counts.cpu(), 2 * expected)
    assert torch.equal(nan.cpu(), 2 * expected_nan)


def test_public_names():
    names = """MOST_MIDDLES ActivationPlan CountPlan activation_states available_implementations conv_bordered conv_pointwise
    count_states is_fused linear_pair linear_regions plan_activation_states plan_count_states"""
    assert set(fastentropy_kernels.__all__) == set(names.split())


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_autocast_changes_nothing(activation, where):
    device, impl = where
    x = torch.randn(37, 5, device=device).bfloat16()
    weight = torch.rand(5, device=device).bfloat16() if activation == "prelu" else None
    plain, cast = zero_counts(5, device=device), zero_counts(5, device=device)
    expected = activation_states(x, plain, activation, weight=weight, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        y = activation_states(x, cast, activation, weight=weight, impl=impl)
    assert y.dtype == x.dtype
    assert torch.equal(y, expected)
    assert torch.equal(cast, plain)
