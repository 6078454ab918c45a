"""The public functions: any layout, every implementation that runs here, and what they refuse."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastentropy_kernels
from fastentropy_kernels import activation_states, available_implementations, count_states, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def oracle(x, channel_axis, mask=None):
    by_channel = x.movedim(channel_axis, -1).double()
    by_channel = by_channel.flatten(0, -2) if mask is None else by_channel[mask]
    return torch.stack([(by_channel < 0).sum(0), (by_channel == 0).sum(0), (by_channel > 0).sum(0)], 1)


# Each makes a view of 4 x 5 x 6 x 7 values out of fresh memory, given a function shape -> tensor.
LAYOUTS = {
    "contiguous": lambda make: make(4, 5, 6, 7),
    "channels_last": lambda make: make(4, 6, 7, 5).permute(0, 3, 1, 2),
    "reversed": lambda make: make(7, 6, 5, 4).permute(3, 2, 1, 0),
    "neuron axis first": lambda make: make(5, 4, 6, 7).transpose(0, 1),
    "sliced inside": lambda make: make(4, 5, 6, 9)[..., 1:8],
    "sliced channels": lambda make: make(4, 9, 6, 7)[:, 2:7],
    "sliced channels, channels_last": lambda make: make(4, 6, 7, 9)[..., 2:7].permute(0, 3, 1, 2),
    "every second": lambda make: make(8, 5, 6, 14)[::2, ..., ::2],
    "expanded": lambda make: make(1, 5, 6, 1).expand(4, 5, 6, 7),
    "expanded channel": lambda make: make(4, 1, 6, 7).expand(4, 5, 6, 7),
    "offset": lambda make: make(4 * 5 * 6 * 7 + 3)[3:].view(4, 5, 6, 7),
    "overlapping": lambda make: make(4 * 5 * 6 + 6).unfold(0, 7, 1).view(4, 5, 6, 7),
}


@settings(deadline=None, max_examples=150)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    axis=st.integers(-4, 3),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_layout_any_axis(layout, dtype, axis, masked, seed):
    torch.manual_seed(seed)
    x = LAYOUTS[layout](lambda *shape: torch.randint(-2, 3, shape).to(dtype))
    mask = torch.rand(x.movedim(axis, 0).shape[1:]) > 0.5 if masked else None
    start = torch.randint(-9, 9, (x.shape[axis], 3))
    for activation in (None, "identity", "relu", "silu"):
        counts = start.clone()
        if activation is None:
            count_states(x, counts, channel_axis=axis, mask=mask)
        else:
            y = activation_states(x, counts, activation, channel_axis=axis, mask=mask)
            assert torch.equal(y, reference.ACTIVATIONS[activation](x))
            assert y.data_ptr() != x.data_ptr()
        assert torch.equal(counts - start, oracle(x, axis, mask))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 5), (0, 4, 3), (2, 4, 0)])
@pytest.mark.parametrize("impl", ["auto", "reference", "numba"])
def test_empty(shape, impl):
    x, counts = torch.empty(shape), torch.full((shape[1], 3), 7)
    count_states(x, counts, impl=impl)
    assert activation_states(x, counts, "relu", impl=impl).shape == shape
    assert (counts == 7).all()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 5, 1, 1), (3, 1), (1, 1, 1)])
def test_axes_of_one(shape):
    x, axis = torch.randn(shape), shape.index(max(shape))
    counts = torch.zeros(shape[axis], 3, dtype=torch.int64)
    assert torch.equal(activation_states(x, counts, "relu", channel_axis=axis), torch.relu(x))
    assert torch.equal(counts, oracle(x[None], axis + 1))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_activation(activation, impl, device):
    x = torch.randn(37, 5, 11, device=device)
    counts = torch.zeros(5, 3, dtype=torch.int64, device=device)
    y = activation_states(x, counts, activation, impl=impl)
    torch.testing.assert_close(y, reference.ACTIVATIONS[activation](x), rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, oracle(x, 1))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_auto_keeps_the_gradient(activation, device):
    x = torch.randn(8, 5, device=device, requires_grad=True)
    counts = torch.zeros(5, 3, dtype=torch.int64, device=device)
    activation_states(x, counts, activation).sum().backward()
    expected = torch.autograd.grad(reference.ACTIVATIONS[activation](x).sum(), x)[0]
    assert torch.equal(x.grad, expected)
    assert torch.equal(counts, oracle(x.detach(), 1))


def call(**changed):
    arguments = {"x": torch.randn(4, 5, 6), "counts": torch.zeros(5, 3, dtype=torch.int64), **changed}
    activation = arguments.pop("activation", None)
    x, counts = arguments.pop("x"), arguments.pop("counts")
    if activation is None:
        count_states(x, counts, **arguments)
    else:
        activation_states(x, counts, activation, **arguments)


COUNTS = torch.zeros(5, 3, dtype=torch.int64)
REFUSED = {
    "integers": ({"x": torch.ones(4, 5, 6, dtype=torch.int32)}, TypeError, "x: got torch.int32"),
    "complex": ({"x": torch.ones(4, 5, 6, dtype=torch.complex64)}, TypeError, "x: got torch.complex64"),
    "no axis": ({"x": torch.tensor(1.0)}, ValueError, "channel_axis: got 1, expected an axis of x, which has 0 axes"),
    "axis": ({"channel_axis": 3}, ValueError, "channel_axis: got 3, expected an axis of x, which has 3 axes"),
    "negative axis": ({"channel_axis": -4}, ValueError, "channel_axis: got -4"),
    "counts of another dtype": ({"counts": COUNTS.int()}, TypeError, "counts: got torch.int32, expected torch.int64"),
    "counts of another axis": ({"channel_axis": 2}, ValueError, r"counts: got shape \[5, 3\], expected \[6, 3\]"),
    "counts without a state": ({"counts": COUNTS[:, :2]}, ValueError, r"counts: got shape \[5, 2\]"),
    "counts with gaps": ({"counts": torch.zeros(5, 6, dtype=torch.int64)[:, ::2]}, ValueError, "contiguous"),
    "counts elsewhere": ({"counts": COUNTS.to("meta")}, ValueError, "counts: got a tensor on meta, expected cpu"),
    "mask of another dtype": ({"mask": torch.ones(4, 6)}, TypeError, "mask: got torch.float32, expected torch.bool"),
    "mask with channels": (
        {"mask": torch.ones(4, 5, 6, dtype=torch.bool)},
        ValueError,
        r"mask: got shape \[4, 5, 6\], expected \[4, 6\]",
    ),
    "mask elsewhere": ({"mask": torch.ones(4, 6, dtype=torch.bool, device="meta")}, ValueError, "mask: .* on meta"),
    "implementation": ({"impl": "cuda"}, ValueError, "impl: got 'cuda', expected auto, triton, numba, reference"),
    "float64 in Numba": ({"x": torch.ones(4, 5, 6, dtype=torch.float64), "impl": "numba"}, TypeError, "torch.float64"),
    "activation": ({"activation": "glu"}, ValueError, "activation: got 'glu', expected one of identity, relu"),
    "gelu in Numba": ({"activation": "gelu", "impl": "numba"}, ValueError, "'gelu', expected identity, relu for impl="),
    "gradient in Numba": (
        {"x": torch.ones(4, 5, 6, requires_grad=True), "activation": "relu", "impl": "numba"},
        ValueError,
        "x: requires a gradient",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_with_counts_unchanged(case):
    changed, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        call(**changed)
    assert "\n" not in str(raised.value)
    assert not COUNTS.any()


def test_named_implementation_is_never_swapped():
    for impl, reason in available_implementations(torch.device("cpu")).items():
        if reason:
            with pytest.raises(ValueError, match="impl: "):
                call(impl=impl)
        else:
            call(impl=impl)


def test_available_implementations_name_a_reason():
    for kind in ("cpu", "cuda", "meta"):
        reasons = available_implementations(torch.device(kind))
        assert list(reasons) == ["triton", "numba", "reference"]
        assert all("\n" not in reason for reason in reasons.values())
    assert available_implementations(torch.device("cpu"))["numba"] == ""
    assert available_implementations(torch.device("cuda"))["numba"] != ""


def test_import_loads_no_compiler_and_changes_nothing():
    program = (
        "import os, sys, torch; before = dict(os.environ), set(sys.modules); import fastentropy_kernels;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before[1]};"
        "assert 'numba' not in new and dict(os.environ) == before[0], new;"
        "assert not any(name.startswith('fastentropy_kernels.states') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_works_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch, fastentropy_kernels as k;"
        "k._installed = lambda package: package != 'triton';"
        "c = torch.zeros(3, 3, dtype=torch.int64); k.count_states(torch.ones(2, 3), c); assert c.sum() == 6;"
        "assert k.available_implementations(torch.device('cpu'))['triton'] == 'triton is not installed'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names():
    assert fastentropy_kernels.__all__ == ["activation_states", "available_implementations", "count_states"]
