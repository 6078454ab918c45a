"""Arguments that the public functions refuse, in one line and before anything is written."""

import math

import pytest
import torch

from fastentropy_kernels import activation_states, activations, count_states, linear_regions

ACTIVATIONS = ", ".join(activations.ACTIVATIONS)
WITH_REGIONS = "relu, relu6, leaky_relu, hardswish, hardtanh, relu2, prelu"
X = torch.randn(4, 5, 6)
COUNTS = torch.full((5, 3), 7)
MASK = torch.ones(4, 6, dtype=torch.bool)
DTYPES = "torch.float16, torch.bfloat16, torch.float32, torch.float64"


def shaped(name, shape, expected, rest="for axis 1 of x"):
    return f"{name}: got shape {shape}, expected {expected}, {rest}"


# Name -> (arguments that replace valid ones, the error, its message)
OF_BOTH = {
    "x int32": ({"x": X.int()}, TypeError, f"x: got torch.int32, expected one of {DTYPES}"),
    "x complex": ({"x": X.to(torch.complex64)}, TypeError, f"x: got torch.complex64, expected one of {DTYPES}"),
    "x float8": ({"x": X.to(torch.float8_e5m2)}, TypeError, f"x: got torch.float8_e5m2, expected one of {DTYPES}"),
    "x 0-d": ({"x": X.sum()}, ValueError, "channel_axis: got 1, expected an axis of x, which has 0 axes"),
    "axis": ({"channel_axis": 3}, ValueError, "channel_axis: got 3, expected an axis of x, which has 3 axes"),
    "axis < 0": ({"channel_axis": -4}, ValueError, "channel_axis: got -4, expected an axis of x, which has 3 axes"),
    "counts int32": ({"counts": COUNTS.int()}, TypeError, "counts: got torch.int32, expected torch.int64"),
    "counts float": ({"counts": COUNTS.double()}, TypeError, "counts: got torch.float64, expected torch.int64"),
    "counts for another axis": (
        {"channel_axis": 2, "mask": None},
        ValueError,
        shaped("counts", "[5, 3]", "[6, 3]", "for axis 2 of x"),
    ),
    "counts with an axis more": ({"counts": COUNTS[None]}, ValueError, shaped("counts", "[1, 5, 3]", "[5, 3]")),
    "counts of two states": ({"counts": COUNTS[:, :2].clone()}, ValueError, shaped("counts", "[5, 2]", "[5, 3]")),
    "counts for edges": ({"edges": [0, 1, 2]}, ValueError, shaped("counts", "[5, 3]", "[5, 4]")),
    "counts with gaps": (
        {"counts": torch.full((5, 6), 7)[:, ::2]},
        ValueError,
        "counts: got strides [6, 2], expected contiguous memory",
    ),
    "counts transposed": (
        {"counts": torch.full((3, 5), 7).t()},
        ValueError,
        "counts: got strides [1, 5], expected contiguous memory",
    ),
    "counts elsewhere": (
        {"counts": COUNTS.to("meta")},
        ValueError,
        "counts: got a tensor on meta, expected cpu, the device of x",
    ),
    "nan float": ({"nan": torch.full((5,), 7.0)}, TypeError, "nan: got torch.float32, expected torch.int64"),
    "nan with a state": ({"nan": torch.full((5, 1), 7)}, ValueError, shaped("nan", "[5, 1]", "[5]")),
    "nan of another axis": ({"nan": torch.full((6,), 7)}, ValueError, shaped("nan", "[6]", "[5]")),
    "nan with gaps": (
        {"nan": torch.full((5, 3), 7)[:, 0]},
        ValueError,
        "nan: got strides [3], expected contiguous memory",
    ),
    "nan elsewhere": (
        {"nan": torch.full((5,), 7, device="meta")},
        ValueError,
        "nan: got a tensor on meta, expected cpu, the device of x",
    ),
    "mask float": ({"mask": MASK.float()}, TypeError, "mask: got torch.float32, expected torch.bool"),
    "mask with channels": (
        {"mask": torch.ones(4, 5, 6, dtype=torch.bool)},
        ValueError,
        "mask: got shape [4, 5, 6], expected [4, 6], that of x without its channel axis",
    ),
    "mask to broadcast": (
        {"mask": MASK[:, :1]},
        ValueError,
        "mask: got shape [4, 1], expected [4, 6], that of x without its channel axis",
    ),
    "mask elsewhere": (
        {"mask": MASK.to("meta")},
        ValueError,
        "mask: got a tensor on meta, expected cpu, the device of x",
    ),
    "no edges": ({"edges": []}, ValueError, "edges: got 0 of them, expected 1 to 15"),
    "16 edges": ({"edges": range(16)}, ValueError, "edges: got 16 of them, expected 1 to 15"),
    "falling edges": (
        {"edges": [1, 0]},
        ValueError,
        "edges: got [1.0, 0.0], expected numbers in rising order, each once",
    ),
    "edge twice": (
        {"edges": [-0.0, 0]},
        ValueError,
        "edges: got [-0.0, 0.0], expected numbers in rising order, each once",
    ),
    "edge NaN": ({"edges": [math.nan]}, ValueError, "edges: got [nan], expected numbers in rising order, each once"),
    "last edge NaN": (
        {"edges": [0, math.nan]},
        ValueError,
        "edges: got [0.0, nan], expected numbers in rising order, each once",
    ),
    "impl": ({"impl": "cuda"}, ValueError, "impl: got 'cuda', expected auto, triton, numba, reference"),
    "numba with float64": (
        {"x": X.double(), "impl": "numba"},
        TypeError,
        "x: got torch.float64, expected float16, bfloat16 or float32 for impl='numba'",
    ),
    "numba elsewhere": (
        {"x": X.to("meta"), "counts": COUNTS.to("meta"), "nan": None, "mask": None, "impl": "numba"},
        ValueError,
        "impl: 'numba' runs on CPU tensors, not on meta",
    ),
}
OF_ACTIVATIONS = {
    "activation": ({"activation": "glu"}, ValueError, f"activation: got 'glu', expected one of {ACTIVATIONS}"),
    "states": ({"states": "signs"}, ValueError, "states: got 'signs', expected 'sign' or 'regions'"),
    "regions of a smooth activation": (
        {"activation": "gelu", "states": "regions"},
        ValueError,
        f"activation: gelu has no linear regions, expected one of {WITH_REGIONS} (or give edges=)",
    ),
    "regions and edges": (
        {"states": "regions", "edges": [0]},
        ValueError,
        "edges: got edges with states='regions', expected one of the two",
    ),
    "counts for regions": ({"states": "regions"}, ValueError, shaped("counts", "[5, 3]", "[5, 2]")),
    "parameter of none": ({"alpha": 1.0}, TypeError, "alpha: not a parameter of relu, which takes none"),
    "parameter of another": (
        {"activation": "elu", "negative_slope": 1.0},
        TypeError,
        "negative_slope: not a parameter of elu, which takes alpha",
    ),
    "parameter of two": (
        {"activation": "softplus", "alpha": 1.0},
        TypeError,
        "alpha: not a parameter of softplus, which takes beta and threshold",
    ),
    "parameter a text": ({"activation": "elu", "alpha": "1"}, TypeError, "alpha: got str, expected a number"),
    "parameter a bool": ({"activation": "elu", "alpha": True}, TypeError, "alpha: got bool, expected a number"),
    "parameter a tensor": (
        {"activation": "elu", "alpha": torch.ones(())},
        TypeError,
        "alpha: got Tensor, expected a number",
    ),
    "hardtanh reversed": (
        {"activation": "hardtanh", "min_val": 2},
        ValueError,
        "min_val: got 2.0, expected less than max_val, which is 1.0",
    ),
    "hardtanh NaN": (
        {"activation": "hardtanh", "max_val": math.nan},
        ValueError,
        "min_val: got -1.0, expected less than max_val, which is nan",
    ),
    "celu": (
        {"activation": "celu", "alpha": 0},
        ValueError,
        "alpha: got 0.0, expected another number: celu divides by it",
    ),
    "softplus": (
        {"activation": "softplus", "beta": 0},
        ValueError,
        "beta: got 0.0, expected another number: softplus divides by it",
    ),
    "weight of another": ({"weight": torch.ones(5)}, TypeError, "weight: not a parameter of relu, only of prelu"),
    "no weight": (
        {"activation": "prelu"},
        TypeError,
        "weight: got None, expected a tensor of 1 or 5 slopes for prelu",
    ),
    "weight of another axis": (
        {"activation": "prelu", "weight": torch.ones(6)},
        ValueError,
        "weight: got shape [6], expected [1] or [5]",
    ),
    "weight 2-d": (
        {"activation": "prelu", "weight": torch.ones(5, 1)},
        ValueError,
        "weight: got shape [5, 1], expected [1] or [5]",
    ),
    "weight 0-d": (
        {"activation": "prelu", "weight": torch.ones(())},
        ValueError,
        "weight: got shape [], expected [1] or [5]",
    ),
    "weight float64": (
        {"activation": "prelu", "weight": torch.ones(5).double()},
        ValueError,
        "weight: got torch.float64 on cpu, expected torch.float32 on cpu, as x",
    ),
    "weight elsewhere": (
        {"activation": "prelu", "weight": torch.ones(5, device="meta")},
        ValueError,
        "weight: got torch.float32 on meta, expected torch.float32 on cpu, as x",
    ),
    "in place with a gradient": (
        {"x": X.clone().requires_grad_(), "inplace": True},
        ValueError,
        "inplace: got True with a gradient required, expected False (or use torch.no_grad())",
    ),
    "in place with a gradient of the slopes": (
        {"activation": "prelu", "weight": torch.ones(5, requires_grad=True), "inplace": True},
        ValueError,
        "inplace: got True with a gradient required, expected False (or use torch.no_grad())",
    ),
    "in place and expanded": (
        {"x": X[:, :, :1].expand(4, 5, 6), "inplace": True},
        ValueError,
        "inplace: got True for x with strides [30, 6, 0], whose values overlap; use x.clone()",
    ),
    "in place and overlapping": (
        {"x": torch.randn(28).unfold(0, 6, 1)[:20].view(4, 5, 6), "inplace": True},
        ValueError,
        "inplace: got True for x with strides [5, 1, 1], whose values overlap; use x.clone()",
    ),
    "gate of another shape": (
        {"gate": X[:, :1]},
        ValueError,
        "gate: got shape [4, 1, 6], expected [4, 5, 6], that of x; use gate.expand_as(x)",
    ),
    "gate of another dtype": (
        {"gate": X.double()},
        TypeError,
        "gate: got torch.float64, expected torch.float32, the dtype of x; use gate.to(x.dtype)",
    ),
    "gate on another device": (
        {"gate": X.to("meta")},
        ValueError,
        "gate: got a tensor on meta, expected cpu, the device of x",
    ),
    "in place with a gate": (
        {"gate": X, "inplace": True},
        ValueError,
        "inplace: got True with a gate, expected False: the product is a new tensor",
    ),
}
CALLS = [
    *(pytest.param(count_states, *case, id=f"count_states, {name}") for name, case in OF_BOTH.items()),
    *(
        pytest.param(activation_states, *case, id=f"activation_states, {name}")
        for name, case in (OF_BOTH | OF_ACTIVATIONS).items()
    ),
]


@pytest.mark.parametrize(("function", "changed", "error", "message"), CALLS)
def test_refused_before_anything_is_written(function, changed, error, message):
    arguments = {"x": X.clone(), "counts": COUNTS.clone(), "nan": torch.full((5,), 7), "mask": MASK, **changed}
    if function is activation_states:
        arguments = {"activation": "relu", **arguments}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: value.detach().clone() for name, value in tensors.items()}
    with pytest.raises(error) as raised:
        function(**arguments)
    assert str(raised.value) == message
    assert "\n" not in message
    assert all(value.is_meta or torch.equal(value, before[name]) for name, value in tensors.items())


def test_refused_by_linear_regions():
    for arguments, message in (
        ({"activation": "glu"}, "activation: got 'glu', "),
        ({"activation": "relu6", "alpha": 1.0}, "alpha: not a parameter of relu6, which takes none"),
        ({"activation": "silu"}, "activation: silu has no linear regions, expected one of "),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            linear_regions(**arguments)


@pytest.mark.parametrize("edges", [5, ["low"], [None]], ids=repr)
def test_edges_that_are_not_numbers(edges):
    with pytest.raises((TypeError, ValueError), match=r"^edges: got .*, expected "):
        count_states(X, COUNTS.clone(), edges=edges)


def test_integer_parameters():
    x = torch.randn(4, 5)
    y = activation_states(x, torch.zeros(5, 3, dtype=torch.int64), "hardtanh", min_val=0, max_val=2)
    assert torch.equal(y, x.clamp(0, 2))


def test_fifteen_edges():
    counts = torch.zeros(16, 16, dtype=torch.int64)
    count_states(torch.arange(16.0)[None] - 0.5, counts, edges=range(15))
    assert torch.equal(counts, torch.eye(16, dtype=torch.int64))
