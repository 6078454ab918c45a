"""The reference against counts taken one value at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy_kernels import reference


def counted(x: torch.Tensor, channel_axis: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Counts [neurons, 3] by a Python loop over the values."""
    neurons = x.shape[channel_axis]
    counts = torch.zeros(neurons, 3, dtype=torch.int64)
    mask = torch.ones(x.movedim(channel_axis, 0).shape[1:], dtype=torch.bool) if mask is None else mask
    keep = mask.flatten().tolist()
    for neuron in range(neurons):
        for value, kept in zip(x.select(channel_axis, neuron).flatten().tolist(), keep, strict=True):
            if kept and not math.isnan(value):
                counts[neuron, 0 if value < 0 else 1 if value == 0 else 2] += 1
    return counts


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 5, 37]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    transposed=st.booleans(),
    masked=st.booleans(),
    data=st.data(),
)
def test_counts_are_those_of_a_loop(shape, dtype, transposed, masked, data):
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.0, -1.0], dtype=dtype)
    x = special[torch.randint(len(special), shape, generator=generator)]
    x = x.mT if transposed and x.ndim >= 2 else x
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    mask = torch.rand(x.movedim(axis, 0).shape[1:], generator=generator) > 0.5 if masked else None
    start = torch.randint(-9, 9, (x.shape[axis], 3), generator=generator)
    counts = start.clone()
    reference.count_states(x, counts, axis, mask)
    assert torch.equal(counts - start, counted(x, axis, mask))


def test_counts_above_the_integers_of_float32():
    counts = torch.zeros(1, 3, dtype=torch.int64)
    reference.count_states(torch.ones(1).expand(2**24 + 1, 1), counts, 1)
    assert counts.tolist() == [[0, 0, 2**24 + 1]]


FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
}


def test_every_activation_has_a_formula():
    assert FORMULAS.keys() == reference.ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_is_its_formula_and_a_new_tensor(activation):
    x = torch.arange(-511, 512, dtype=torch.float64)[:, None] / 32
    counts = torch.zeros(1, 3, dtype=torch.int64)
    y = reference.activation_states(x, counts, activation, 1)
    expected = torch.tensor([FORMULAS[activation](value) for value in x.flatten().tolist()], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), expected, rtol=1e-12, atol=1e-12)
    assert y.data_ptr() != x.data_ptr()
    assert counts.tolist() == [[511, 1, 511]]
