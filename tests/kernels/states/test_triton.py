"""The Triton kernels against the reference: in the interpreter, and on a GPU where there is one.

The interpreter has to be chosen before the kernels are imported. So `test_in_the_interpreter` runs this file again in a process
of its own.
"""

import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy_kernels import activations, activations_triton
from fastentropy_kernels.states import launch_triton

pytest.importorskip("triton")

from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.states import kernels_triton, reference
from fastentropy_kernels.states.launch_triton import LAUNCHES, Launch

INTERPRETED = activations_triton.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    # The interpreter computes both sides of a tl.where.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: test_in_the_interpreter runs it"
)

# Dtype -> relative tolerance: that of float32 arithmetic, or one step of the format (the interpreter truncates).
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Absolute tolerance for the cancellation in 1 + erf(x): two steps of float32 below 1, times x / 2 up to 3.
ATOL = 4e-7
# Activations that need no arithmetic.
EXACT = ("identity", "relu", "relu6", "hardtanh")
POISON = 77.0


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout


def random_values(shape, dtype, seed=0):
    """Values of both signs. About one in 16 is each of 0, -0, the infinities, NaN and a subnormal of either sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3
    # The interpreter reads subnormals of bfloat16 as zero. A GPU does not.
    smallest = {torch.float32: 1e-40, torch.float16: 1e-7, torch.bfloat16: 1e-37 if INTERPRETED else 1e-40}[dtype]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, smallest, -smallest])
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.4, chosen, x).to(dtype).to(DEVICE)


def shapes(*sizes):
    """Draw a shape of these sizes, a small one in the interpreter, which takes 10 ms for each tile."""
    products = itertools.product(*sizes)
    return st.sampled_from([shape for shape in products if not INTERPRETED or math.prod(shape) <= 10_000])


def random_edges(values, number, seed):
    """Edges in rising order: numbers of float64, values that occur, and their neighbours in float64."""
    generator = torch.Generator().manual_seed(seed)
    finite = values.cpu().double().flatten()
    finite = torch.cat([finite[finite.isfinite()][:number], torch.randn(2 * number, generator=generator).double()])
    edges = torch.cat([finite, finite.nextafter(torch.tensor(torch.inf).double())]).unique()
    return sorted(edges[torch.randperm(len(edges), generator=generator)[:number]].tolist())


def check(values, y=None, activation="identity", parameters=(), weight=None, mask=None, edges=None, launch=None):
    """Count into random counters and write y, which may be the values. The counters are exactly those of the reference."""
    x, states = values.cpu().clone(), 3 if edges is None else len(edges) + 1
    start = torch.randint(-(2**40), 2**40, (values.shape[1], states + 1))
    expected, expected_nan = start[:, 1:].clone(), start[:, 0].clone()
    counts, nan = expected.to(DEVICE, copy=True), expected_nan.to(DEVICE, copy=True)
    reference.add_states(x, expected, 1, edges=edges, mask=mask, nan=expected_nan)
    arguments = {"y": y, "activation": activation, "parameters": parameters, "weight": weight, "launch": launch}
    launch_triton.add_states(values, counts, edges=edges, mask=None if mask is None else mask.to(DEVICE), nan=nan, **arguments)
    assert torch.equal(counts.cpu(), expected)
    assert torch.equal(nan.cpu(), expected_nan)
    if y is not None:
        exact = activations.activate(x.double(), activation, parameters, None if weight is None else weight.cpu().double())
        rtol, atol = (0, 0) if activation in EXACT else (RTOL[x.dtype], ATOL)
        torch.testing.assert_close(y.cpu(), exact.to(x.dtype), rtol=rtol, atol=atol, equal_nan=True)


def check_gate(values, gate, activation="silu", mask=None, launch=None, target=None):
    """The product is that of the activation as the kernel writes it without a gate, rounded once more."""
    alone, y = torch.full_like(values, POISON), torch.full_like(values, POISON) if target is None else target
    counts, expected = torch.zeros(2, values.shape[1], 3, dtype=torch.int64, device=DEVICE)
    options = {"activation": activation, "mask": None if mask is None else mask.to(DEVICE), "launch": launch}
    launch_triton.add_states(values, expected, y=alone, **options)
    launch_triton.add_states(values, counts, y=y, gate=gate, **options)
    assert torch.equal(counts, expected)
    # The interpreter truncates to bfloat16, and reads its subnormals as zero.
    rtol, atol = (2**-7, 2.0**-125) if INTERPRETED and values.dtype == torch.bfloat16 else (0, 0)
    torch.testing.assert_close(y, alone * gate, rtol=rtol, atol=atol, equal_nan=True)


CASES = {
    "dtype": st.sampled_from(list(RTOL)),
    "masked": st.booleans(),
    "edges": st.integers(0, 15),
    "target": st.sampled_from([None, "y", "x"]),
    "activation": st.sampled_from(["identity", "relu"]),
    # That of the table, and long strips of small tiles.
    "launch": st.sampled_from([None, Launch(512, 512, 4, 1), Launch(2048, 256, 4, 1)]),
    "seed": st.integers(0, 2**31),
}


@runs_kernels
@settings(max_examples=40)
@given(
    shape=shapes([1, 37, 1023], [1, 5, 37, 128, 130]),
    gap=st.sampled_from([0, 5, 16]),
    y_gap=st.sampled_from([0, 3, 16]),
    **CASES,
)
def test_rows(shape, gap, y_gap, dtype, masked, edges, target, activation, launch, seed):
    rows, channels = shape
    memory = random_values((rows, gap + channels), dtype, seed)
    values = memory[:, gap:]
    around = torch.full((rows, y_gap + channels), POISON, dtype=dtype, device=DEVICE)
    check(
        values,
        {None: None, "y": around[:, y_gap:], "x": values}[target],
        activation,
        mask=torch.rand(rows) > 0.5 if masked else None,
        edges=random_edges(values, edges, seed) or None,
        launch=launch,
    )
    assert (around[:, :y_gap] == POISON).all()
    assert torch.equal(memory[:, :gap].nan_to_num(), random_values(memory.shape, dtype, seed)[:, :gap].nan_to_num())


@runs_kernels
@settings(max_examples=40)
@given(
    shape=shapes([1, 2, 5], [1, 3, 37], [2, 37, 196, 256, 1023]),
    offset=st.sampled_from([0, 1]),
    **CASES,
)
def test_planes(shape, offset, dtype, masked, edges, target, activation, launch, seed):
    size = math.prod(shape)
    values = random_values((offset + size,), dtype, seed)[offset:].view(shape)
    around = torch.full((offset + size + 1,), POISON, dtype=dtype, device=DEVICE)
    check(
        values,
        {None: None, "y": around[offset:-1].view(values.shape), "x": values}[target],
        activation,
        mask=torch.rand(values[:, 0].shape) > 0.5 if masked else None,
        edges=random_edges(values, edges, seed) or None,
        launch=launch,
    )
    assert (around[:offset] == POISON).all()
    assert around[-1] == POISON


@runs_kernels
@settings(max_examples=15)
@given(
    shape=shapes([1, 37, 1023], [1, 5, 37, 130]) | shapes([1, 2, 5], [1, 3, 37], [2, 256, 1023]),
    gaps=st.tuples(*3 * [st.sampled_from([0, 5, 16])]),
    dtype=CASES["dtype"],
    activation=st.sampled_from(["relu", "silu", "gelu_tanh"]),
    masked=st.booleans(),
    launch=CASES["launch"],
    seed=CASES["seed"],
)
def test_gate(shape, gaps, dtype, activation, masked, launch, seed):
    def strided(gap, seed):
        if len(shape) == 3:
            return random_values(shape, dtype, seed)
        return random_values((shape[0], gap + shape[1]), dtype, seed)[:, gap:]

    values, gate, y = (strided(gap, seed + i) for i, gap in enumerate(gaps))
    mask = torch.rand(values[:, 0].shape) > 0.5 if masked else None
    check_gate(values, gate, activation, mask, launch, y)


@runs_kernels
@pytest.mark.parametrize("line", LAUNCHES)
@pytest.mark.parametrize("edges", [None, (-3.0, 0.0, 3.0)])
def test_every_line_of_the_table(line, edges):
    values = random_values((211, 133) if "rows" in line else (2, 3, 8200), torch.bfloat16)
    mask = torch.rand(values[:, 0].shape) > 0.5
    check(values, torch.full_like(values, POISON), "relu", mask=mask, edges=edges, launch=LAUNCHES[line])


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "tile_bytes"),
    [((3001, 1), 128), ((1_100_000, 1), 65536), ((1, 1, 66_001), 128), ((1, 1, 1_100_000), 65536)],
    ids=["rows, narrow sums", "rows, wide sums", "planes", "planes, several values a lane"],
)
@pytest.mark.parametrize("edges", [None, (-0.5, 0.5)])
def test_longer_than_the_longest_strip(shape, tile_bytes, edges, monkeypatch):
    monkeypatch.setattr(launch_triton, "_multiprocessors", lambda values: 1)
    launch = Launch(tile_bytes, tile_bytes, 4, programs_per_multiprocessor=1)
    constants = launch_triton.tile(shape, 2, launch)
    positions = constants["BLOCK_ROWS"] if len(shape) == 2 else constants["BLOCK_INNER"]
    is_wide = len(shape) == 3 or positions > kernels_triton.MAX_NARROW.value
    longest = launch_triton._longest_strip(constants["REPEATS"], positions, is_wide)
    assert math.prod(shape) > longest * positions
    lanes = positions // constants["REPEATS"]
    states = torch.arange(lanes).remainder(5).sub(1).clamp(max=1).bfloat16()  # a lane keeps to one, most of them to "on"
    values = states.repeat(math.prod(shape) // lanes + 1)[: math.prod(shape)]
    check(values.view(shape).to(DEVICE), edges=edges, launch=launch)


@runs_kernels
def test_counters_of_a_lane_filled_up(monkeypatch):
    monkeypatch.setattr(launch_triton, "_multiprocessors", lambda values: 1)
    values = torch.arange(256).remainder(3).sub(1).bfloat16().expand(1100, 256).contiguous()
    check(values.to(DEVICE), launch=Launch(512, 512, 4, programs_per_multiprocessor=1))


@pytest.mark.parametrize("warps", [4, 8, 16, 32])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (1, 1, 1 << 20)], ids=["narrow rows", "rows", "planes"])
def test_no_counter_can_overflow(shape, element_size, warps):
    constants = launch_triton.tile(shape, element_size, Launch(32768, 32768, warps, 1))
    positions = constants["BLOCK_ROWS"] if len(shape) == 2 else constants["BLOCK_INNER"]
    is_wide = positions > kernels_triton.MAX_NARROW.value
    assert is_wide == (shape != (1, 256))
    longest = launch_triton._longest_strip(constants["REPEATS"], positions, is_wide)
    assert longest * constants["REPEATS"] < 2**10
    assert 0 < longest * positions < (2**21 if is_wide else 2**10)


@pytest.mark.parametrize(("rows", "programs"), [(64, 1), (256, 4), (32 * 40 * 2, 40), (32 * 40 * 3, 40)])
def test_number_of_programs(rows, programs, monkeypatch):
    monkeypatch.setattr(launch_triton, "_multiprocessors", lambda values: 1)
    launch = Launch(8192, 256, 4, programs_per_multiprocessor=40, shortest_strip=2)  # tiles of 32 rows
    values = torch.empty(rows, 128, dtype=torch.bfloat16)
    constants = launch_triton.tile(values.shape, 2, launch)
    assert launch_triton._rows_arguments(values, None, None, 0, constants, launch)[1] == programs


@pytest.mark.parametrize(("layout", "width"), [("rows", (64,)), ("planes", (16, 16))])
def test_line_of_the_table_by_size(layout, width):
    enough = launch_triton.SMALL_BELOW[layout] // (4 * math.prod(width))
    assert launch_triton._line(torch.empty(enough, *width), None) == layout
    assert launch_triton._line(torch.empty(enough - 1, *width), None) == f"small {layout}"
    assert launch_triton._line(torch.empty(enough - 1, *width), (0.0,)) == f"histogram {layout}"


@runs_kernels
def test_row_strides_beyond_32_bits():
    memory = torch.empty(2**31 + 80, dtype=torch.bfloat16, device=DEVICE)  # a CPU has no memory for it until it is touched
    values = memory.as_strided((3, 64), (2**30 + 8, 1))
    values.copy_(random_values((3, 64), torch.bfloat16))
    check(values, values, "relu")


PARAMETERS = [
    *((name, tuple(activation.parameters.values())) for name, activation in ACTIVATIONS.items() if name != "prelu"),
    ("leaky_relu", (-0.3,)),
    ("elu", (0.5,)),
    ("celu", (2.5,)),
    ("celu", (-40.0,)),
    ("softplus", (0.5, 3.0)),
    ("softplus", (-2.0, 40.0)),
    ("hardtanh", (-0.25, 3.5)),
]


def range_of_values(dtype):
    """2,112 values, far from zero and close to it, with infinities and NaN."""
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0**125, -(2.0**125), 1e-37, -1e-37])
    around = torch.linspace(-100, 100, 1023), torch.randn(1023), torch.randn(59) * 1e-4, special
    return torch.cat(around).to(dtype).to(DEVICE)


@runs_kernels
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("activation", "parameters"), PARAMETERS)
def test_activation_and_its_regions(activation, parameters, dtype):
    values = range_of_values(dtype).view(-1, 4)
    regions = ACTIVATIONS[activation].regions
    edges = regions(*parameters) if regions else None
    check(values, torch.full_like(values, POISON), activation, parameters, edges=edges)


def activated(x, activation):
    """The activation of numbers by the kernel, in float64."""
    y = torch.full_like(x, POISON).view(-1, 4)
    launch_triton.add_states(x.view(-1, 4), torch.zeros(4, 3, dtype=torch.int64, device=DEVICE), y=y, activation=activation)
    return y.view(-1).cpu().double()


@runs_kernels
def test_error_of_the_gelu_polynomial():
    x = torch.linspace(-10, 10, 400_000)
    exact = x.double() * torch.special.erfc(x.double() / -math.sqrt(2)) / 2
    error = (activated(x.to(DEVICE), "gelu") - exact).abs()
    # The errors of the polynomial are 1.6e-7 and 0.16%. That of float32 arithmetic comes on top.
    assert (error <= 2.5e-7 + 2**-23 * exact.abs()).all()
    assert (error <= 0.0017 * exact.abs()).all()


@runs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu"])
def test_language_model_activations_for_every_bfloat16(activation):
    x = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    x = x[x.abs() >= 2.0**-126] if INTERPRETED else x  # drops NaN, and subnormals, which the interpreter reads as zero
    x = torch.cat([x, torch.tensor([0, 0, torch.nan, -torch.nan] * 4)])[: (len(x) + 4) // 4 * 4].bfloat16().to(DEVICE)
    exact = activations.activate(x.cpu().double(), activation)
    torch.testing.assert_close(activated(x, activation), exact, rtol=2**-7, atol=1e-9, equal_nan=True)


@runs_kernels
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("shape", [(528, 4), (2, 4, 264)])
@pytest.mark.parametrize("slopes", ["one", "one each", "every second", "one for all"])
def test_prelu(slopes, shape, dtype):
    memory = torch.randn(8).to(dtype).to(DEVICE)
    weight = {
        "one": memory[:1],
        "one each": memory[:4],
        "every second": memory[::2],
        "one for all": memory[:1].expand(4),
    }[slopes]
    values = range_of_values(dtype).view(shape)
    check(values, torch.full_like(values, POISON), "prelu", weight=weight)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current():
    x, counts = torch.randn(37, 5, device="cuda:1"), torch.zeros(5, 3, dtype=torch.int64, device="cuda:1")
    launch_triton.add_states(x, counts)
    assert counts.sum() == x.numel()
