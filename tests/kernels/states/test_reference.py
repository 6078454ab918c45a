"""The reference against counts and activations computed one value at a time, in Python's floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy_kernels import activations
from fastentropy_kernels.states import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Python's floats differ from float32: 0.1 is another number, and 1e-50 is not zero.
EDGES = [-math.inf, -6.0000001, -1.0, -0.1, -1e-50, -0.0, 1e-50, 0.1, 0.30000001192092896, 1.0, 6.0000001, 65504.0, math.inf]
VALUES = [*EDGES, 0.0, math.nan, 1e-45, -1e-45, 6e-8, -6e-8, 6.0, -6.0, 3e38]


def state(value, edges):
    """The column of a value."""
    if edges is None:
        return 0 if value < 0 else 1 if value == 0 else 2
    return sum(edge <= value for edge in edges)


def counted(x, channel_axis, edges, mask):
    """Counts [neurons, states] and NaN [neurons], by a loop over the values."""
    counts = torch.zeros(x.shape[channel_axis], 3 if edges is None else len(edges) + 1, dtype=torch.int64)
    nan = torch.zeros(x.shape[channel_axis], dtype=torch.int64)
    for neuron in range(x.shape[channel_axis]):
        values = x.select(channel_axis, neuron)
        values = values.flatten() if mask is None else values[mask]
        for value in values.tolist():
            if math.isnan(value):
                nan[neuron] += 1
            else:
                counts[neuron, state(value, edges)] += 1
    return counts, nan


@settings(max_examples=80)
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 5, 37]), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    edges=st.none() | st.sets(st.sampled_from(EDGES), min_size=1).map(sorted),
    transposed=st.booleans(),
    masked=st.booleans(),
    data=st.data(),
)
def test_states_equal_a_loop(shape, dtype, edges, transposed, masked, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.tensor(VALUES, dtype=dtype)[torch.randint(len(VALUES), shape, generator=generator)]
    x = x.mT if transposed and x.ndim >= 2 else x
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    mask = torch.rand(x.movedim(axis, 0).shape[1:], generator=generator) > 0.5 if masked else None
    expected, expected_nan = counted(x, axis, edges, mask)
    start = torch.randint(-9, 9, expected.shape, generator=generator)
    counts, nan = start.clone(), start[:, 0].clone()
    reference.add_states(x, counts, axis, edges=edges, mask=mask, nan=nan)
    assert torch.equal(counts - start, expected)
    assert torch.equal(nan - start[:, 0], expected_nan)


def test_counts_beyond_the_integers_of_float32():
    counts = torch.zeros(1, 3, dtype=torch.int64)
    reference.add_states(torch.ones(1).expand(2**24 + 1, 1), counts, 1)
    assert counts.tolist() == [[0, 0, 2**24 + 1]]


def softplus(x, beta=1.0, threshold=20.0):
    return x if x * beta > threshold else math.log1p(math.exp(x * beta)) / beta


FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x, negative_slope=0.01: x if x > 0 else negative_slope * x,
    "elu": lambda x, alpha=1.0: x if x > 0 else alpha * math.expm1(x),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "celu": lambda x, alpha=1.0: max(x, 0.0) + min(alpha * math.expm1(x / alpha), 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "softplus": softplus,
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    "hardtanh": lambda x, min_val=-1.0, max_val=1.0: min(max(x, min_val), max_val),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "prelu": lambda x, weight: x if x > 0 else weight * x,
}
PARAMETERS = [
    *((name, {}) for name in FORMULAS),
    ("leaky_relu", {"negative_slope": -0.3}),
    ("elu", {"alpha": 0.7}),
    ("celu", {"alpha": 2.5}),
    ("softplus", {"beta": 2.0, "threshold": 5.0}),
    ("softplus", {"beta": -0.5, "threshold": 3.0}),
    ("hardtanh", {"min_val": -0.1, "max_val": 7.3}),
]


def test_every_activation_has_a_formula():
    assert FORMULAS.keys() == activations.ACTIVATIONS.keys()


@pytest.mark.parametrize(("activation", "parameters"), PARAMETERS)
def test_activation_equals_its_formula(activation, parameters):
    x = torch.arange(-511, 512, dtype=torch.float64)[:, None] / 16
    weight = torch.tensor([0.3], dtype=torch.float64) if activation == "prelu" else None
    values = (activations.ACTIVATIONS[activation].parameters | parameters).values()
    y = activations.activate(x, activation, tuple(values), weight)
    weights = () if weight is None else (0.3,)
    expected = [FORMULAS[activation](value, *weights, **parameters) for value in x.flatten().tolist()]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=2e-15, atol=2e-15)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("activation", ["prelu", "quick_gelu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_own_activations_are_rounded_once(activation, dtype):
    x = (torch.randn(1023, 7) * 4).to(dtype)
    weight = torch.randn(7).to(dtype) if activation == "prelu" else None
    y = activations.activate(x, activation, (), weight)
    wide = activations.activate(x.float(), activation, (), None if weight is None else weight.float())
    torch.testing.assert_close(y, wide.to(dtype), rtol=0, atol=0)
