"""Tensors of any layout: counts, the result and its strides, writing in place, and which are read without a copy."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy_kernels import activation_states, activations, count_states
from fastentropy_kernels.layout import arrange
from fastentropy_kernels.states import reference
from tests._helpers.tensors import assert_same

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Name -> parameters. These activations are exact in every implementation, and every implementation fuses relu.
ACTIVATIONS = {"relu": (), "hardtanh": (-1.0, 1.0), "leaky_relu": (0.01,), "prelu": ()}
EDGES = (-1.5, 0.1, 2.0)


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def fresh(*shape, dtype=torch.float32, device="cpu"):
    """Random values, some of them zeros, edges, NaN or infinite."""
    special = torch.tensor([0.0, -0.0, -1.5, 0.1, 2.0, 1.0, -3.0, torch.nan, torch.inf, -torch.inf])
    chosen = special[torch.randint(len(special), shape)]
    return torch.where(torch.rand(shape) < 0.4, chosen, torch.randn(shape)).to(dtype).to(device)


# Name -> (a view of the memory that `make(*shape)` returns; the channel axis; whether it is read without a copy)
LAYOUTS = {
    "rows": (lambda make: make(17, 33), 1, True),
    "rows of one": (lambda make: make(17, 1), 1, True),
    "one row": (lambda make: make(1, 33), 1, True),
    "rows 1-d": (lambda make: make(33), 0, True),
    "rows 1-d with gaps": (lambda make: make(66)[::2], 0, False),
    "rows 3-d": (lambda make: make(3, 7, 33), 2, True),
    "rows 4-d": (lambda make: make(3, 2, 5, 33), -1, True),
    "rows with gaps": (lambda make: make(17, 40)[:, 5:38], 1, True),
    "rows 3-d with gaps": (lambda make: make(3, 7, 40)[..., 5:38], 2, True),
    "rows of one with gaps": (lambda make: make(17, 3)[:, 1:2], 1, True),
    "one row with gaps": (lambda make: make(1, 40)[:, 5:38], 1, True),
    "every third row": (lambda make: make(51, 33)[::3], 1, True),
    "rows of every second channel": (lambda make: make(17, 66)[:, ::2], 1, False),
    "first token of each row": (lambda make: make(17, 6, 33)[:, 0], 1, True),
    "all but the first token": (lambda make: make(5, 6, 33)[:, 1:], 2, False),
    "transposed": (lambda make: make(33, 17).t(), 1, True),
    "transposed with gaps": (lambda make: make(33, 20)[:, 3:].t(), 1, False),
    "channels first": (lambda make: make(33, 17), 0, True),
    "heads": (lambda make: make(2, 7, 3, 11).transpose(1, 2), 1, True),
    "planes 3-d": (lambda make: make(4, 5, 37), 1, True),
    "planes 4-d": (lambda make: make(4, 5, 6, 7), 1, True),
    "planes 5-d": (lambda make: make(2, 5, 3, 4, 7), 1, True),
    "planes of one": (lambda make: make(4, 5, 1, 1), 1, True),
    "planes without images": (lambda make: make(5, 6, 7), 0, True),
    "planes along the last axis but one": (lambda make: make(2, 3, 4, 5, 6), -2, True),
    "channels_last": (lambda make: make(4, 6, 7, 5).permute(0, 3, 1, 2), 1, True),
    "channels_last 3d": (lambda make: make(2, 3, 6, 7, 5).permute(0, 4, 1, 2, 3), 1, True),
    "channels_last, sliced channels": (lambda make: make(4, 6, 7, 9)[..., 2:7].permute(0, 3, 1, 2), 1, True),
    "channels_last, sliced width": (lambda make: make(4, 6, 9, 5)[:, :, 1:8].permute(0, 3, 1, 2), 1, False),
    "planes, sliced channels": (lambda make: make(4, 9, 6, 7)[:, 2:7], 1, False),
    "planes, sliced width": (lambda make: make(4, 5, 6, 9)[..., 1:8], 1, False),
    "planes, every second": (lambda make: make(8, 5, 6, 14)[::2, ..., ::2], 1, False),
    "planes, reversed axes": (lambda make: make(7, 6, 5, 4).permute(3, 2, 1, 0), 1, True),
    "planes, images and channels exchanged": (lambda make: make(5, 4, 6, 7).transpose(0, 1), 1, True),
    "planes, channels between the other axes": (lambda make: make(6, 4, 5, 7).permute(1, 2, 0, 3), 1, True),
    "offset": (lambda make: make(4 * 5 * 42 + 3)[3:].view(4, 5, 6, 7), 1, True),
    "expanded": (lambda make: make(1, 5, 6, 1).expand(4, 5, 6, 7), 1, False),
    "expanded rows": (lambda make: make(5).expand(9, 5), 1, False),
    "expanded channel": (lambda make: make(4, 1, 6, 7).expand(4, 5, 6, 7), 1, False),
    "one value": (lambda make: make().expand(4, 5, 6), 1, False),
    "overlapping": (lambda make: make(4 * 5 * 6 + 6).unfold(0, 7, 1).view(4, 5, 6, 7), 1, False),
    "overlapping rows": (lambda make: make(20).unfold(0, 5, 1), 1, False),
    "empty rows": (lambda make: make(0, 5), 1, False),
    "empty channels": (lambda make: make(4, 0, 6), 1, False),
    "empty planes": (lambda make: make(4, 5, 0, 7), 1, False),
    "empty, transposed": (lambda make: make(6, 5, 0).permute(2, 1, 0), 1, False),
    "empty, sliced": (lambda make: make(4, 5, 6)[:, :, 3:3], 1, False),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@st.composite
def layouts(draw):
    """A function make -> tensor, and the channel axis. Axes have any order in memory, and are sliced, strided or expanded."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7]) | st.integers(0, 40), min_size=1, max_size=5))
    sizes = [size if prod(sizes[: axis + 1]) <= 5000 else 1 for axis, size in enumerate(sizes)]
    order = draw(st.permutations(range(len(sizes))))
    expanded = [draw(st.integers(0, 9)) == 0 for _ in sizes]
    before, after = ([draw(st.sampled_from([0, 0, 0, 1, 3])) for _ in sizes] for _ in range(2))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in sizes]

    def view(make):
        memory = make(*(1 if expanded[a] else before[a] + sizes[a] * steps[a] + after[a] for a in order))
        x = memory.permute([order.index(axis) for axis in range(len(sizes))])
        for axis, size in enumerate(sizes):
            if not expanded[axis]:
                x = x.narrow(axis, before[axis], size * steps[axis])[(slice(None),) * axis + (slice(None, None, steps[axis]),)]
        return x.expand(sizes)

    return view, draw(st.integers(-len(sizes), len(sizes) - 1))


def whole(x):
    """The memory that `x` is a view of, and where in it the values of `x` are."""
    memory = x.new_empty(0).set_(x.untyped_storage())
    inside = torch.zeros_like(memory, dtype=torch.bool)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return memory, inside


def check(x, axis, activation, masked, edges, inplace, impl="auto"):
    """Activate and count `x`, or only count it without an activation, and compare all memory that may be written."""
    neurons = x.shape[axis]
    mask = torch.rand(x.movedim(axis, 0).shape[1:], device=x.device).mT > 0.5 if masked and x.ndim > 2 else None
    mask = mask if mask is None else mask.mT
    start = torch.randint(-(2**40), 2**40, (neurons, 3 if edges is None else len(edges) + 1), device=x.device)
    expected, expected_nan = start.clone(), start[:, 0].clone()
    reference.add_states(
        x.clone(memory_format=torch.contiguous_format), expected, axis, mask=mask, edges=edges, nan=expected_nan
    )
    counts, nan = start.clone(), start[:, 0].clone()
    memory, inside = whole(x)
    before = memory.clone()
    asked = {"channel_axis": axis, "mask": mask, "edges": edges, "nan": nan, "impl": impl}
    if activation is None:
        count_states(x, counts, **asked)
    else:
        weight = torch.randn(neurons).to(x) if activation == "prelu" else None
        expected_y = activations.activate(x, activation, ACTIVATIONS[activation], weight, axis)
        y = activation_states(x, counts, activation, weight=weight, inplace=inplace, **asked)
        assert_same(y, expected_y)
        assert y.stride() == (x if inplace else torch.empty_like(x)).stride()
        if inplace:
            assert y is x
        else:
            assert x.numel() == 0 or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(counts, expected)
    assert torch.equal(nan, expected_nan)
    untouched = ~inside if inplace else slice(None)
    assert_same(memory[untouched], before[untouched])


def overlaps(x):
    return x.numel() > 0 and whole(x)[1].sum() < x.numel()


@each_layout
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_layout(layout, activation, dtype, device):
    view, axis, _ = LAYOUTS[layout]
    for masked in (False, True):
        for edges in (None, EDGES):
            check(
                view(lambda *shape: fresh(*shape, dtype=dtype, device=device)), axis, activation, masked, edges, inplace=False
            )


@each_layout
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layout_in_place(layout, activation, device):
    view, axis, _ = LAYOUTS[layout]
    x = view(lambda *shape: fresh(*shape, device=device))
    if overlaps(x):
        before, counts = x.clone(), torch.zeros(x.shape[axis], 3, dtype=torch.int64, device=device)
        weight = torch.ones(1, device=device) if activation == "prelu" else None
        with pytest.raises(ValueError, match="inplace: got True for x with strides "):
            activation_states(x, counts, activation, channel_axis=axis, weight=weight, inplace=True)
        assert not counts.any()
        assert_same(x, before)
    else:
        check(x, axis, activation, masked=True, edges=EDGES, inplace=True)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    masked=st.booleans(),
    edges=st.sampled_from([None, EDGES]),
    inplace=st.booleans(),
    impl=st.sampled_from(["auto", "reference"]),
    seed=st.integers(0, 2**31),
)
def test_any_layout(device, layout, dtype, activation, masked, edges, inplace, impl, seed):
    torch.manual_seed(seed)
    view, axis = layout
    x = view(lambda *shape: fresh(*shape, dtype=dtype, device=device))
    check(x, axis, activation, masked, edges, inplace and not overlaps(x), impl)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@each_layout
def test_gradient_of_a_layout(layout, activation, device):
    view, axis, _ = LAYOUTS[layout]
    x = view(lambda *shape: torch.randn(shape, device=device)).requires_grad_()
    counts = torch.zeros(x.shape[axis], 3, dtype=torch.int64, device=device)
    y = activation_states(x, counts, activation, channel_axis=axis)
    grad = torch.randn_like(y)
    assert_same(torch.autograd.grad(y, x, grad), torch.autograd.grad(getattr(F, activation)(x), x, grad))
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", [name for name, (*_, direct) in LAYOUTS.items() if direct])
def test_dense_layouts_are_not_copied(layout):
    view, axis, _ = LAYOUTS[layout]
    x = view(fresh)
    assert arrange(x, axis % x.ndim, None).values.data_ptr() == x.data_ptr()


@pytest.mark.slow
def test_mask_of_any_layout():
    x = fresh(4, 5, 6, 7)
    for mask in (
        torch.rand(4, 6, 14)[..., ::2] > 0.5,
        (torch.rand(7, 6, 4) > 0.5).permute(2, 1, 0),
        (torch.rand(4, 1, 1) > 0.5).expand(4, 6, 7),
    ):
        for x in (fresh(4, 5, 6, 7), fresh(4, 6, 7, 5).permute(0, 3, 1, 2), fresh(4, 5, 6, 9)[..., 2:]):
            counts, expected = torch.zeros(2, 5, 3, dtype=torch.int64)
            count_states(x, counts, mask=mask)
            reference.add_states(x, expected, 1, mask=mask.clone())
            assert torch.equal(counts, expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_negated_view(activation, inplace, device):
    x = torch.randn(7, 1, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    values, counts = x.clone(), torch.zeros(1, 3, dtype=torch.int64, device=device)
    if activation is None:
        count_states(x, counts)
    else:
        y = activation_states(x, counts, activation, inplace=inplace)
        assert_same(y, getattr(F, activation)(values))
        assert_same(x, y if inplace else values)
    assert counts.tolist() == [[(values < 0).sum(), 0, (values > 0).sum()]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("written", ["x", "counts", "nan"])
def test_backward_detects_overwritten_tensors(written, activation, device):
    tensors = {"x": torch.randn(4, 5, device=device), "counts": torch.zeros(5, 3, dtype=torch.int64, device=device)}
    tensors["nan"] = tensors["counts"][:, 0].clone()
    product = torch.ones((), device=device, requires_grad=True) * tensors[written]
    weight = torch.ones(5, device=device) if activation == "prelu" else None
    activation_states(**tensors, activation=activation, weight=weight, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_place_without_gradients(mode):
    x, counts = torch.nn.Parameter(torch.randn(4, 5)), torch.zeros(5, 3, dtype=torch.int64)
    expected = F.relu(x.detach())
    with mode():
        assert activation_states(x, counts, "relu", inplace=True) is x
    assert torch.equal(x, expected)


def test_in_place_is_refused_with_a_gradient():
    x, counts = torch.randn(4, 5), torch.zeros(5, 3, dtype=torch.int64)
    before = x.clone()
    for x_needs, weight_needs in ((True, False), (False, True)):
        weight = torch.ones(5, requires_grad=weight_needs)
        with pytest.raises(ValueError, match="inplace: got True with a gradient required, expected False"):
            activation_states(x.requires_grad_(x_needs), counts, "prelu", weight=weight, inplace=True)
    assert not counts.any()
    assert torch.equal(x, before)
