"""The functions in compiled, exported, fake and captured programs return and count what they do in eager mode."""

import io
import math
import shutil

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from fastentropy_kernels import activation_states, activations, count_states
from tests._helpers.tensors import assert_same

ops = torch.ops.fastentropy_kernels

EDGES = (-math.inf, -1e-50, 0.1, math.inf)
# Name -> arguments besides x [batch, 5, 4], counts and nan. Without an activation only the states are counted.
ASKED = {
    "states": {},
    "states between edges": {"edges": EDGES},
    **{activation: {"activation": activation} for activation in activations.ACTIVATIONS if activation != "prelu"},
    "prelu": {"activation": "prelu", "weight": torch.tensor([-1.0, 0.0, 0.25, 1.0, 3.0])},
    "prelu along the last axis": {"activation": "prelu", "weight": torch.randn(4), "channel_axis": -1},
    "parameters": {"activation": "softplus", "beta": 2, "threshold": 1.5},
    "regions": {"activation": "hardtanh", "states": "regions", "min_val": -0.1},
    "edges": {"activation": "gelu", "edges": EDGES},
    "reference": {"activation": "silu", "impl": "reference"},
    "numba": {"activation": "relu", "impl": "numba"},
}
each = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
SOME = ("states", "relu", "prelu along the last axis", "parameters", "regions", "edges")
some = pytest.mark.parametrize("asked", [ASKED[name] for name in SOME], ids=SOME)


def fresh(*shape, device="cpu"):
    """Normal values with zeros, edges and NaN."""
    special = torch.tensor([0.0, -0.0, 0.1, -3.0, 3.0, 6.0, torch.nan, torch.inf, -torch.inf])
    return torch.where(torch.rand(shape) < 0.3, special[torch.randint(len(special), shape)], torch.randn(shape) * 3).to(device)


def counters(asked, device="cpu"):
    """Counts and nan, not zero."""
    states = len(asked["edges"]) + 1 if "edges" in asked else 3
    neurons = 4 if asked.get("channel_axis") == -1 else 5
    return torch.full((neurons, states), 7, device=device), torch.full((neurons,), 9, device=device)


def call(x, counts, nan, activation=None, **asked):
    if activation is None:
        count_states(x, counts, nan=nan, **asked)
        return x
    return activation_states(x, counts, activation, nan=nan, **asked)


def assert_runs_as_eager(program, asked, batches=(4, 4), device="cpu"):
    """Compare `program(x, counts, nan)` with the eager function on fresh batches: result, strides, counts and nan."""
    counts, nan = counters(asked, device)
    expected_counts, expected_nan = counts.clone(), nan.clone()
    for batch in batches:
        x = fresh(batch, 5, 4, device=device)
        before = x.clone()
        y, expected = program(x, counts, nan), call(x, expected_counts, expected_nan, **asked)
        assert_same(y, expected)
        assert y.stride() == expected.stride()
        assert_same(x, before)
        assert torch.equal(counts, expected_counts)
        assert torch.equal(nan, expected_nan)


LAYOUTS = {
    "rows": lambda: fresh(6, 5),
    "planes": lambda: fresh(2, 5, 3),
    "channels_last": lambda: fresh(2, 5, 3, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: fresh(5, 6).t(),
    "sliced": lambda: fresh(6, 9)[:, 2:7],
    "one row with gaps": lambda: fresh(1, 9)[:, 2:7],
    "planes with gaps": lambda: fresh(2, 5, 6)[..., ::2],
    "expanded": lambda: fresh(5).expand(6, 5),
    "one image": lambda: fresh(1, 5, 1, 1),
    "empty": lambda: fresh(0, 5, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_pass_opcheck(layout, dtype):
    x = LAYOUTS[layout]().to(dtype).nan_to_num(0, 3, -3)
    mask = torch.rand(x.movedim(1, 0).shape[1:]) > 0.5
    weight = torch.randn(5, dtype=dtype)
    opcheck(ops.count_states, (x, 1, None, None, "auto"))
    opcheck(ops.count_states, (x, 1, mask, EDGES, "auto"))
    opcheck(ops.activation_states, (x, "relu", [], None, 1, None, None, "auto"))
    opcheck(ops.activation_states, (x, "hardtanh", [-0.5, 2.0], None, -1, None, EDGES, "reference"))
    opcheck(ops.activation_states, (x, "prelu", [], weight, 1, mask, EDGES, "auto"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_pass_opcheck(layout, dtype):
    x = LAYOUTS[layout]().to(dtype).nan_to_num(0, 3, -3).requires_grad_()
    weight = torch.randn(5, dtype=dtype, requires_grad=True)
    opcheck(ops.count_states, (x, 1, None, None, "auto"))
    opcheck(ops.activation_states, (x, "relu", [], None, 1, None, None, "auto"))
    opcheck(ops.activation_states, (x, "elu", [0.7], None, 1, None, EDGES, "auto"))
    opcheck(ops.activation_states, (x, "prelu", [], weight, 1, None, None, "auto"))
    opcheck(ops.activation_states, (x.detach(), "prelu", [], weight[:1], 1, None, None, "auto"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_return_new_tensors(layout):
    x = LAYOUTS[layout]()
    for activation in ("identity", "relu", "gelu"):
        y, counts, nan = ops.activation_states(x, activation, [], None, 1, None, None, "auto")
        assert y.stride() == torch.empty_like(x).stride()
        assert y.numel() == 0 or y.data_ptr() != x.data_ptr()
        assert not counts.requires_grad
        assert not nan.requires_grad


def test_only_y_has_a_gradient():
    y, counts, nan = ops.activation_states(fresh(6, 5).requires_grad_(), "gelu", [], None, 1, None, None, "auto")
    assert (y.requires_grad, counts.requires_grad, nan.requires_grad) == (True, False, False)


@pytest.mark.slow
@each
def test_compiled_full_graph(asked):
    compiled = torch.compile(lambda *tensors: call(*tensors, **asked), fullgraph=True, backend="aot_eager")
    assert_runs_as_eager(compiled, asked)


def test_compiled_with_a_mask():
    def function(x, counts, nan, mask):
        return activation_states(x, counts, "mish", mask=mask, nan=nan)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, mask = fresh(6, 5, 4), torch.rand(6, 4) > 0.5
    both = [counters({}), counters({})]
    y, expected = compiled(x, *both[0], mask), function(x, *both[1], mask)
    assert_same((y, *both[0]), (expected, *both[1]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_on_any_layout(layout):
    compiled = torch.compile(activation_states, fullgraph=True, backend="aot_eager")
    x, counts, expected = LAYOUTS[layout](), *torch.zeros(2, 5, 3, dtype=torch.int64)
    y = compiled(x, counts, "relu")
    assert_same(y, activation_states(x, expected, "relu"))
    assert y.stride() == torch.empty_like(x).stride()
    assert torch.equal(counts, expected)


@pytest.mark.slow
def test_compiled_by_inductor():
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")

    def function(x, counts, nan):
        y = activation_states(x * 2, counts, "relu", edges=EDGES, nan=nan)
        count_states(y, counts, edges=EDGES, nan=nan)
        return y + 1

    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    both = [counters({"edges": EDGES}), counters({"edges": EDGES})]
    for _ in range(2):
        x = fresh(6, 5, 4)
        assert_same(compiled(x, *both[0]), function(x, *both[1]))
        assert_same(both[0], both[1])


def test_two_calls_in_one_graph_add_up():
    def function(x, counts, nan):
        count_states(x, counts, nan=nan)
        y = activation_states(x, counts, "relu", nan=nan)
        return activation_states(y, counts, "gelu", nan=nan)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, both = fresh(6, 5, 4), [counters({}), counters({})]
    for _ in range(3):
        assert_same((compiled(x, *both[0]), *both[0]), (function(x, *both[1]), *both[1]))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"activation": "relu"}, {"activation": "gelu", "edges": EDGES}], ids=str)
def test_one_graph_for_any_batch(asked):
    compiled = torch.compile(lambda *tensors: call(*tensors, **asked), fullgraph=True, dynamic=True, backend="aot_eager")
    assert_runs_as_eager(compiled, asked, batches=(6,))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_runs_as_eager(compiled, asked, batches=(7, 64, 11))
    assert_runs_as_eager(compiled, asked, batches=(1, 0, 5))


@pytest.mark.slow
def test_compiled_with_changing_parameters():
    def function(x, counts, slope):
        return activation_states(x, counts, "leaky_relu", negative_slope=slope)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for slope in (0.1, 0.5, -1.0, 2):
        x, counts, expected = fresh(6, 5), *torch.zeros(2, 5, 3, dtype=torch.int64)
        assert_same(compiled(x, counts, slope), function(x, expected, slope))
        assert torch.equal(counts, expected)


@pytest.mark.slow
@each
def test_compiled_gradient(asked):
    if "activation" not in asked:
        x, (counts, nan) = fresh(4, 5, 4).requires_grad_(), counters(asked)
        expected = counts.clone(), nan.clone()
        call(x.detach(), *expected, **asked)
        torch.compile(lambda *tensors: call(*tensors, **asked), fullgraph=True, backend="aot_eager")(x, counts, nan)
        assert_same((counts, nan), expected)
        return
    asked = {**asked, **({"weight": asked["weight"].clone().requires_grad_()} if "weight" in asked else {})}
    function = torch.compile(lambda *tensors: call(*tensors, **asked), fullgraph=True, backend="aot_eager")
    x = fresh(4, 5, 4).nan_to_num(0, 6, -6).requires_grad_()
    leaves = [x, *([asked["weight"]] if "weight" in asked else [])]
    grad, both = torch.randn_like(x), [counters(asked), counters(asked)]
    ours = torch.autograd.grad(function(x, *both[0]), leaves, grad)
    eager = torch.autograd.grad(call(x, *both[1], **asked), leaves, grad)
    assert_same((ours, *both[0]), (eager, *both[1]))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_compiled_in_place(activation):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, counts):
        return activation_states(x, counts, activation, inplace=True)

    x, counts, expected = fresh(6, 5), *torch.zeros(2, 5, 3, dtype=torch.int64)
    y = activation_states(x, expected, activation)
    overwritten = function(x, counts)
    assert overwritten.data_ptr() == x.data_ptr()
    assert_same((overwritten, x), (y, y))
    assert torch.equal(counts, expected)


class Counting(nn.Module):
    """A module that counts the states of its input in buffers."""

    def __init__(self, asked):
        super().__init__()
        self.asked = {name: value for name, value in asked.items() if name != "weight"}
        self.weight = nn.Parameter(asked["weight"]) if "weight" in asked else None
        counts, nan = counters(asked)
        self.register_buffer("counts", counts)
        self.register_buffer("nan", nan)

    def forward(self, x):
        weight = {} if self.weight is None else {"weight": self.weight}
        return call(x, self.counts, self.nan, **self.asked, **weight) + 0


def assert_buffers_count(program, asked):
    """Run `program(x)`, a module as `Counting`, on batches of several sizes."""
    expected = program.counts.clone(), program.nan.clone()
    for batch in (4, 9, 2):
        x = fresh(batch, 5, 4)
        with torch.no_grad():
            assert_same(program(x), call(x, *expected, **asked) + 0)
        assert_same((program.counts, program.nan), expected)


def exported(asked, strict=False):
    batch = {0: torch.export.Dim("batch", min=2)}
    return torch.export.export(Counting(asked), (fresh(4, 5, 4),), strict=strict, dynamic_shapes=(batch,))


@pytest.mark.slow
@some
@pytest.mark.parametrize("strict", [False, True])
def test_exported_buffers_count(asked, strict):
    assert_buffers_count(exported(asked, strict).module(), asked)


@pytest.mark.slow
@some
def test_saved_and_loaded_buffers_count(asked):
    file = io.BytesIO()
    torch.export.save(exported(asked).run_decompositions(), file)
    file.seek(0)
    assert_buffers_count(torch.export.load(file).module(), asked)


@pytest.mark.slow
def test_compiled_module_counts_in_its_buffers():
    module = Counting({"activation": "relu"})
    module.compile(fullgraph=True, backend="aot_eager")
    assert_buffers_count(module, {"activation": "relu"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("asked", [{}, *({"activation": name} for name in ("relu", "gelu", "relu2"))], ids=str)
def test_fake_tensors(asked, layout):
    x, counts, nan = LAYOUTS[layout](), torch.zeros(5, 3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    y = call(x, counts, nan, **asked)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, counts, nan)]
        mask = torch.ones(fake[0].movedim(1, 0).shape[1:], dtype=torch.bool)
        fake_y = call(*fake, mask=mask, **asked)
    assert (fake_y.shape, fake_y.dtype, fake_y.device) == (y.shape, y.dtype, y.device)
    assert [s for s, size in zip(fake_y.stride(), y.shape, strict=True) if size > 1] == [
        s for s, size in zip(y.stride(), y.shape, strict=True) if size > 1
    ]  # PyTorch's own fake tensors differ from its tensors in the strides of axes of one


@pytest.mark.filterwarnings("ignore")
def test_traced_by_torch_jit():
    def function(x, counts):
        return activation_states(x, counts, "relu")

    traced = torch.jit.trace(function, (fresh(6, 5), torch.zeros(5, 3, dtype=torch.int64)), check_trace=False)
    x, counts, expected = fresh(6, 5), *torch.zeros(2, 5, 3, dtype=torch.int64)
    assert_same(traced(x, counts), function(x, expected))
    assert torch.equal(counts, expected)


class Named(torch.Tensor):
    """A tensor subclass."""


def test_subclasses_go_through_the_operator():
    x, counts, expected = fresh(6, 5), *torch.zeros(2, 5, 3, dtype=torch.int64)
    y = activation_states(x.as_subclass(Named), counts, "relu")
    assert type(y) is Named
    assert_same(y.as_subclass(torch.Tensor), activation_states(x, expected, "relu"))
    assert torch.equal(counts, expected)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@each
def test_captured_in_a_cuda_graph(asked):
    if asked.get("impl") == "numba":
        asked = {**asked, "impl": "triton"}
    asked = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in asked.items()}
    x, (counts, nan) = fresh(4, 5, 4, device="cuda"), counters(asked, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(x, counts.clone(), nan.clone(), **asked)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, counts, nan, **asked)
    before, before_nan = counts.clone(), nan.clone()
    once, once_nan = torch.zeros_like(counts), torch.zeros_like(nan)
    x.copy_(fresh(4, 5, 4))
    expected = call(x, once, once_nan, **asked)
    for replayed in range(1, 6):
        graph.replay()
        assert_same(y, expected)
        assert torch.equal(counts, before + replayed * once)
        assert torch.equal(nan, before_nan + replayed * once_nan)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor_on_a_gpu(mode):
    asked = {"activation": "gelu", "edges": EDGES}
    compiled = torch.compile(lambda *tensors: call(*tensors, **asked), fullgraph=True, mode=mode)
    assert_runs_as_eager(compiled, asked, batches=(4, 4, 4, 4), device="cuda")
