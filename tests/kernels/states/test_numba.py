"""The Numba loops against the reference, exactly: counts, and the bits of the result."""

import logging
import math
import threading

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy_kernels import activations
from fastentropy_kernels.states import launch_numba, reference, tasks_numba
from tests._helpers.tensors import FUSED_DTYPES, INTEGER, bits, random_values

FUSED = ("identity", "relu", "relu6")
EDGES = st.lists(st.floats(allow_nan=False), min_size=1, max_size=15, unique=True).map(sorted) | st.sampled_from(
    [(0.0,), (-0.0,), (1e-50,), (-1e-50,), (-torch.inf, 0.1, torch.inf), (-1e300, 1e300), tuple(range(-7, 8))]
)


def awkward_values(dtype):
    """Zero, subnormals, numbers around 6, the greatest number, infinity and NaN, of both signs."""
    bounds = torch.tensor([torch.finfo(dtype).smallest_normal, 6, torch.inf], dtype=dtype).view(INTEGER[dtype])
    last = torch.iinfo(INTEGER[dtype]).max
    magnitudes = torch.cat([torch.tensor([0, 1, last]), *(bounds.long() + i for i in (-1, 0, 1))]).to(INTEGER[dtype])
    return torch.cat([magnitudes, magnitudes ^ torch.iinfo(INTEGER[dtype]).min]).view(dtype)


def counters(values, states=3, seed=0):
    """Counts and NaN that do not start from 0."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-(2**40), 2**40, (values.shape[1], states), generator=generator)
    return counts, torch.randint(-(2**40), 2**40, (values.shape[1],), generator=generator)


def check_signs(values, mask, seed=0):
    """Count `values`, which are rows or planes: alone, with y in poisoned memory, and with y over the values."""
    expected, expected_nan = counters(values, seed=seed)
    reference.add_states(values, expected, 1, mask=mask, nan=expected_nan)
    for activation in (None, *FUSED):
        for inplace in (False, True):
            counts, nan = counters(values, seed=seed)
            x = values.clone(memory_format=torch.preserve_format) if values.is_contiguous() else gapped(values)
            y = None if activation is None else x if inplace else gapped(torch.full_like(values, torch.nan))
            launch_numba.add_states(x, counts, mask=mask, nan=nan, y=y, activation=activation or "identity")
            assert torch.equal(counts, expected)
            assert torch.equal(nan, expected_nan)
            if y is not None:
                assert torch.equal(bits(y), bits(activations.activate(values, activation)))
            if not inplace:
                assert torch.equal(bits(x), bits(values))


def gapped(rows):
    """A copy of rows with a gap after each. Planes get none."""
    if rows.ndim == 3:
        return rows.clone()
    copy = torch.full((rows.shape[0], rows.shape[1] + 3), torch.nan, dtype=rows.dtype)[:, : rows.shape[1]]
    return copy.copy_(rows)


def check_histogram(values, edges, mask, seed=0):
    expected, expected_nan = counters(values, len(edges) + 1, seed)
    counts, nan = counters(values, len(edges) + 1, seed)
    reference.add_states(values, expected, 1, edges=edges, mask=mask, nan=expected_nan)
    launch_numba.add_states(values, counts, edges=edges, mask=mask, nan=nan)
    assert torch.equal(counts, expected)
    assert torch.equal(nan, expected_nan)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 37, 1023]),
    channels=st.sampled_from([1, 3, 16, 37, 1023, 1024, 2500]),
    gap=st.sampled_from([0, 5]),
    dtype=st.sampled_from(list(INTEGER)),
    masked=st.booleans(),
    edges=EDGES,
    seed=st.integers(0, 2**31),
)
def test_rows(rows, channels, gap, dtype, masked, edges, seed):
    values = random_values((rows, gap + channels), dtype, seed)[:, gap:]
    mask = torch.rand(rows) > 0.5 if masked else None
    check_signs(values, mask, seed)
    check_histogram(values[:50], edges, mask if mask is None else mask[:50], seed)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    outer=st.sampled_from([1, 2, 5, 33]),
    channels=st.sampled_from([1, 3, 37]),
    inner=st.sampled_from([2, 37, 49, 784, 1023]),
    offset=st.sampled_from([0, 1]),
    dtype=st.sampled_from(list(INTEGER)),
    masked=st.booleans(),
    edges=EDGES,
    seed=st.integers(0, 2**31),
)
def test_planes(outer, channels, inner, offset, dtype, masked, edges, seed):
    flat = random_values((offset + outer * channels * inner,), dtype, seed)
    values = flat[offset:].view(outer, channels, inner)
    mask = torch.rand(outer, inner) > 0.5 if masked else None
    check_signs(values, mask, seed)
    check_histogram(values[:3], edges, mask if mask is None else mask[:3], seed)


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 1023), (37, 3), (1, 1, 2), (3, 2, 37), (2, 1, 1023)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
def test_awkward_values_at_every_position(dtype, masked, shape):
    awkward = awkward_values(dtype)
    positions = torch.arange(math.prod(shape)).view(shape)
    mask = torch.rand(shape[0], *shape[2:]) > 0.5 if masked else None
    for shift in range(awkward.numel()):
        check_signs(awkward[(positions + shift) % awkward.numel()], mask)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(70_000, 3), (200_000, 1), (140_000, 16), (1, 2, 100_000), (2, 32_768)])
def test_narrow_sums_do_not_overflow(shape):
    check_signs(torch.ones(shape, dtype=torch.bfloat16), None)
    check_signs(torch.ones(shape, dtype=torch.bfloat16), torch.ones(shape[0], *shape[2:], dtype=torch.bool))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_more_than_2_to_the_31_values(layout):
    """np.zeros calls calloc: memory that nobody writes is one page of zeros, however long. torch.zeros would write it."""
    half = 2**30 + 8
    memory = torch.from_numpy(np.zeros(2 * half + 64, np.int16)).view(torch.bfloat16)
    if layout == "rows":
        values, zeros = memory.as_strided((3, 64), (half, 1)), 2
    else:
        values, zeros = memory[: 2 * half].view(1, 2, half), half - 1
    values[..., -1] = 1
    values[-1, ...].view(-1)[:1] = -1
    counts = torch.zeros(values.shape[1], 3, dtype=torch.int64)
    launch_numba.add_states(values, counts)
    assert counts[-1].tolist() == [0, 0 if layout == "rows" else zeros, 3 if layout == "rows" else 1]
    assert counts[0].tolist() == ([1, 2, 0] if layout == "rows" else [1, half - 2, 1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4099, 37), (33, 5, 1023)])
@pytest.mark.parametrize("dtype", INTEGER)
def test_any_number_of_threads(shape, dtype):
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            values = random_values(shape, dtype, number)
            check_signs(values, None)
            check_histogram(values, (-1.0, 0.0, 2.0), None)
    finally:
        torch.set_num_threads(threads)


def test_concurrent_calls_add_up():
    values = random_values((16, 8, 1023), torch.float32, 0)
    once = torch.zeros(8, 3, dtype=torch.int64)
    reference.add_states(values, once, 1)
    counts = torch.zeros(8, 3, dtype=torch.int64)

    def count():
        for _ in range(50):
            launch_numba.add_states(values, counts)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(counts, 200 * once)


def test_one_thread_without_openmp(monkeypatch):
    monkeypatch.setattr(launch_numba, "openmp_parallel", lambda: None)
    check_signs(random_values((33, 5, 1023), torch.float32, 0), None)
    check_signs(random_values((4099, 37), torch.bfloat16, 0), None)


@pytest.mark.slow
def test_flushed_subnormals_are_counted():
    values = torch.tensor([[1e-40], [-1e-40], [0.0]])
    counts = torch.zeros(1, 3, dtype=torch.int64)
    torch.set_flush_denormal(True)
    try:
        launch_numba.add_states(values, counts)
    finally:
        torch.set_flush_denormal(False)
    assert counts.tolist() == [[1, 1, 1]]


def test_long_compilation_is_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(launch_numba, "_LONG_COMPILATION", -1.0)
    monkeypatch.setattr(launch_numba, "_compilation_reported", threading.Event())
    launch_numba._compiled.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fastentropy_kernels"):
        for _ in range(2):
            launch_numba.add_states(torch.ones(2, 3), torch.zeros(3, 3, dtype=torch.int64))
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["fastentropy compiled a CPU loop"]


def test_disk_cache_notices_changed_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    hits = []
    for digest in (1, 1, 2):
        monkeypatch.setattr(tasks_numba, "loops_digest", lambda digest=digest: digest)
        hits.append(tasks_numba.compile_adder().cache_hits)
    assert hits == [0, 1, 0]
