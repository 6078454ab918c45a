"""The Triton kernels against the reference: in the interpreter, on a GPU where there is one, and compiled without one.

The interpreter has to be chosen before Triton is imported, so it runs in a process of its own: this file again.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fastentropy_kernels import reference, states_triton

INTERPRETED = states_triton.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"

runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: test_in_the_interpreter runs it"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="an interpreted function cannot be compiled")

# dtype -> relative and absolute tolerance: of float32 arithmetic, or one step of the format (the interpreter truncates)
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (2**-7, 2e-6), torch.float16: (2**-10, 2e-6)}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout


def random_values(shape, dtype, seed):
    """Values of both signs, and among every 16 about one each of 0, -0, infinities, NaN and subnormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3
    # The interpreter reads bfloat16's subnormals as zero; a GPU does not.
    smallest = {torch.float32: 1e-40, torch.float16: 1e-7, torch.bfloat16: 1e-37 if INTERPRETED else 1e-40}[dtype]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, smallest, -smallest])
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.4, chosen, x).to(dtype)


def check(values, mask, seed=0):
    """Count, and count beside the exact activations, from random start values, against the reference on the CPU."""
    start = torch.randint(-(2**40), 2**40, (values.shape[1], 3), generator=torch.Generator().manual_seed(seed))
    expected = start.clone()
    reference.count_states(values, expected, 1, mask)
    on_device = values.to(DEVICE) if DEVICE == "cuda" else values
    mask = None if mask is None else mask.to(DEVICE)
    counts = start.clone().to(DEVICE)
    states_triton.count_states(on_device, counts, mask)
    assert torch.equal(counts.cpu(), expected)
    for activation in ("identity", "relu"):
        counts = start.clone().to(DEVICE)
        y = states_triton.activation_states(on_device, counts, activation, mask)
        assert torch.equal(counts.cpu(), expected)
        torch.testing.assert_close(y.cpu(), reference.ACTIVATIONS[activation](values), rtol=0, atol=0, equal_nan=True)


@runs_kernels
@settings(deadline=None, max_examples=25)
@given(
    rows=st.sampled_from([1, 37, 1023]),
    channels=st.sampled_from([1, 37, 128, 130]),
    gap=st.sampled_from([0, 5, 16]),
    dtype=st.sampled_from(list(TOLERANCE)),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows(rows, channels, gap, dtype, masked, seed):
    values = random_values((rows, gap + channels), dtype, seed)[:, gap:]
    check(values, torch.rand(rows) > 0.5 if masked else None, seed)


@runs_kernels
@settings(deadline=None, max_examples=25)
@given(
    outer=st.sampled_from([1, 2, 5]),
    channels=st.sampled_from([1, 3, 37]),
    inner=st.sampled_from([2, 37, 196, 1023]),
    offset=st.sampled_from([0, 1]),
    dtype=st.sampled_from(list(TOLERANCE)),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_planes(outer, channels, inner, offset, dtype, masked, seed):
    flat = random_values((offset + outer * channels * inner,), dtype, seed)
    check(flat[offset:].view(outer, channels, inner), torch.rand(outer, inner) > 0.5 if masked else None, seed)


@runs_kernels
@pytest.mark.parametrize("shape", [(300_000, 1), (1, 1, 300_000)])
def test_longer_than_the_longest_strip(shape, monkeypatch):
    monkeypatch.setattr(states_triton, "_PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(states_triton, "_TILE_BYTES", 512)
    x = torch.arange(300_000).remainder(256).remainder(3).sub(1).bfloat16().view(shape)  # a lane keeps to one state
    expected, counts = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    reference.count_states(x, expected, 1)
    states_triton.count_states(x.to(DEVICE), counts)
    assert torch.equal(counts.cpu(), expected)


@runs_kernels
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes both sides of a where
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation(activation, dtype):
    x = torch.cat([torch.linspace(-100, 100, 1023), torch.randn(1023), torch.randn(37) * 1e-4, torch.tensor([torch.nan])])
    x = x[:, None].to(dtype)
    counts = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    y = states_triton.activation_states(x.to(DEVICE), counts, activation)
    rtol, atol = TOLERANCE[dtype]
    expected = reference.ACTIVATIONS[activation](x.double()).to(dtype)
    torch.testing.assert_close(y.cpu(), expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    x, counts = torch.randn(37, 5, device="cuda:1"), torch.zeros(5, 3, dtype=torch.int64, device="cuda:1")
    states_triton.count_states(x, counts)
    assert counts.sum() == x.numel()


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "rows": (states_triton._states_rows_kernel, ("BLOCK_ROWS", "BLOCK_CHANNELS")),
    "planes": (states_triton._states_planes_kernel, ("BLOCK_CHANNELS", "BLOCK_INNER")),
}


def compile_ahead(layout, dtype, activation, target, masked=False):
    """Compile a kernel as a launch on aligned contiguous input of 256 channels (and 3136 positions) would.

    `activation` None counts alone.
    """
    kernel, block_names = KERNELS[layout]
    element_size = {"fp32": 4, "bf16": 2}[dtype]
    if layout == "rows":
        blocks = states_triton.rows_tile(256, element_size)
    else:
        blocks = states_triton.planes_tile(256, 3136, element_size)
    constants = {
        "ACTIVATION": activation or "identity",
        "WRITES_Y": activation is not None,
        "HAS_MASK": masked,
        **({"INNER_MULTIPLE": 16} if layout == "planes" else {}),
        **({} if activation else {"y_ptr": None}),
        **({} if masked else {"mask_ptr": None}),
        **dict(zip(block_names, blocks, strict=True)),
    }
    pointers = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "mask_ptr": "*i1", "counts_ptr": "*i64"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {"x_ptr", "y_ptr", "mask_ptr", "counts_ptr", "channels", "x_row_stride", "y_row_stride"} - set(constants)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned & set(names)},
    )
    options = {"num_warps": states_triton.NUM_WARPS, "enable_fp_fusion": True}
    return compile(source, target=TARGETS[target], options=options)


@compiles
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", KERNELS)
def test_compiles_without_a_gpu(layout, dtype, activation, target):
    assembly = compile_ahead(layout, dtype, activation, target).asm
    if target == "gfx942":
        assert re.search(r"\.vgpr_spill_count:\s+0\b", assembly["amdgcn"])
        return
    accesses = re.findall(r"\b(?:ld|st)\.(?:global|local)\S*", assembly["ptx"])
    reads, writes = [a for a in accesses if a.startswith("ld")], [a for a in accesses if a.startswith("st")]
    assert reads
    assert bool(writes) == (activation is not None)
    assert all(re.fullmatch(r"(ld|st)\.global\S*\.(v4\.b32|v2\.b64)", access) for access in accesses), accesses
    assert "ftz" not in "".join(re.findall(r"setp\S*", assembly["ptx"]))  # a flushed subnormal would count as zero


@compiles
@pytest.mark.parametrize("layout", KERNELS)
def test_compiles_with_a_mask(layout):
    accesses = re.findall(r"\bld\.global\S*", compile_ahead(layout, "bf16", "relu", "sm_90", masked=True).asm["ptx"])
    assert sum(access.endswith(".v4.b32") for access in accesses) >= 4  # those of x; of the mask in planes, too
