"""The Numba loops against the reference, exactly: counts, and the bits of y."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy_kernels import reference, states_numba

INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_values(shape, dtype, seed):
    """Every bit pattern is as likely as any other, but for zeros of both signs, which are every eighth value."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(INTEGER[dtype])
    x = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(INTEGER[dtype]).view(dtype)
    zeros = torch.rand(shape, generator=generator)
    return x.masked_fill(zeros < 0.06, 0.0).masked_fill(zeros > 0.94, -0.0)


def bits(x):
    """The bits of a tensor: -0.0 is not 0.0, and one NaN is as good as another (PyTorch changes their payload)."""
    return x.masked_fill(x.isnan(), torch.nan).contiguous().view(INTEGER[x.dtype])


def check(values, mask, seed=0):
    """Count and activate `values`, arranged as rows or planes, from random start values, against the reference."""
    start = torch.randint(-(2**40), 2**40, (values.shape[1], 3), generator=torch.Generator().manual_seed(seed))
    expected, counts = start.clone(), start.clone()
    reference.count_states(values, expected, 1, mask)
    states_numba.count_states(values, counts, mask)
    assert torch.equal(counts, expected)
    for activation in states_numba.FUSED_ACTIVATIONS:
        counts = start.clone()
        y = states_numba.activation_states(values, counts, activation, mask)
        assert torch.equal(counts, expected)
        assert torch.equal(bits(y), bits(reference.ACTIVATIONS[activation](values)))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([1, 3, 4, 37, 1023]),
    channels=st.sampled_from([1, 3, 16, 37, 1023, 1024, 2500]),
    gap=st.sampled_from([0, 5]),
    dtype=st.sampled_from(list(INTEGER)),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows(rows, channels, gap, dtype, masked, seed):
    values = random_values((rows, gap + channels), dtype, seed)[:, gap:]
    check(values, torch.rand(rows) > 0.5 if masked else None, seed)


@settings(deadline=None, max_examples=60)
@given(
    outer=st.sampled_from([1, 2, 5, 33]),
    channels=st.sampled_from([1, 3, 37]),
    inner=st.sampled_from([2, 37, 49, 784, 1023]),
    offset=st.sampled_from([0, 1]),
    dtype=st.sampled_from(list(INTEGER)),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_planes(outer, channels, inner, offset, dtype, masked, seed):
    flat = random_values((offset + outer * channels * inner,), dtype, seed)
    check(flat[offset:].view(outer, channels, inner), torch.rand(outer, inner) > 0.5 if masked else None, seed)


@pytest.mark.parametrize("shape", [(70_000, 3), (200_000, 1), (140_000, 16), (1, 2, 100_000)])
def test_more_values_than_sixteen_bits_count(shape):
    check(torch.ones(shape, dtype=torch.bfloat16), None)
    check(torch.ones(shape, dtype=torch.bfloat16), torch.ones(shape[0], *shape[2:], dtype=torch.bool))


@pytest.mark.parametrize("shape", [(4099, 37), (33, 5, 1023)])
@pytest.mark.parametrize("dtype", INTEGER)
def test_any_number_of_threads(shape, dtype):
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            check(random_values(shape, dtype, number), None)
    finally:
        torch.set_num_threads(threads)


def test_concurrent_calls_add_up():
    values = random_values((16, 8, 1023), torch.float32, 0)
    once = torch.zeros(8, 3, dtype=torch.int64)
    reference.count_states(values, once, 1)
    counts = torch.zeros(8, 3, dtype=torch.int64)

    def count():
        for _ in range(50):
            states_numba.count_states(values, counts)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(counts, 200 * once)


def test_without_openmp_one_thread_does_all_tasks(monkeypatch):
    monkeypatch.setattr(states_numba, "_openmp_parallel", lambda: None)
    check(random_values((33, 5, 1023), torch.float32, 0), None)
    check(random_values((4099, 37), torch.bfloat16, 0), None)


def test_subnormals_count_while_pytorch_flushes_them():
    values = torch.tensor([[1e-40], [-1e-40], [0.0]])
    counts = torch.zeros(1, 3, dtype=torch.int64)
    torch.set_flush_denormal(True)
    try:
        states_numba.count_states(values, counts)
    finally:
        torch.set_flush_denormal(False)
    assert counts.tolist() == [[1, 1, 1]]
