"""Which implementation runs, and what is imported for it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastentropy_kernels import activation_states, activations, available_implementations, count_states, is_fused
from fastentropy_kernels import dispatch as shared_dispatch
from fastentropy_kernels.states import dispatch, reference
from tests._helpers.tensors import FUSED_DTYPES

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))


@pytest.fixture
def used(monkeypatch):
    """The names of the implementations whose kernels were called, in order. The reference counts in their place."""
    names = []

    class Kernels:
        @staticmethod
        def add_states(
            values, counts, *, edges, mask, nan, y=None, activation="identity", parameters=(), weight=None, gate=None
        ):
            names.append(chosen[-1])
            reference.add_states(values, counts, 1, edges=edges, mask=mask, nan=nan)
            if y is not None:
                y.copy_(activations.activate(values, activation, parameters, weight))

        @staticmethod
        def fuses(activation, edges):
            return activation == "relu"

    chosen = []
    monkeypatch.setattr(dispatch, "state_kernels", lambda impl: chosen.append(impl) or Kernels)
    return names


def call(dtype=torch.float32, activation=None, device=CPU, **asked):
    x, counts = torch.randn(4, 5, dtype=dtype, device=device), torch.zeros(5, 3, dtype=torch.int64, device=device)
    if activation is None:
        return count_states(x, counts, **asked)
    return activation_states(x, counts, activation, **asked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["auto", "numba"])
def test_cpu_takes_numba(dtype, impl, used):
    call(dtype, impl=impl)
    call(dtype, "relu", impl=impl)
    assert used == ["numba", "numba"]


def test_unfused_activation_is_counted_by_numba(used):
    x, counts = torch.randn(4, 5), torch.zeros(5, 3, dtype=torch.int64)
    assert torch.equal(activation_states(x, counts, "gelu", impl="numba"), F.gelu(x))
    assert counts.sum() == 20
    assert used == ["numba"]


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*FUSED_DTYPES, torch.float64], ids=str)
def test_fused_activation_does_not_call_pytorch(dtype, activation, monkeypatch):
    calls = []
    monkeypatch.setattr(dispatch, "activate", lambda x, *_: calls.append(x) or x)
    weight = torch.ones(5, dtype=dtype) if activation == "prelu" else None
    call(dtype, activation, weight=weight)
    assert is_fused(activation, torch.empty(0, dtype=dtype)) == (not calls)
    assert (not calls) == (activation in ("identity", "relu", "relu6") and dtype != torch.float64)


def test_is_fused_by_device():
    for activation in activations.ACTIVATIONS:
        assert dispatch._is_fused(activation, "cuda", torch.float32) == torch.cuda.is_available()
        assert not is_fused(activation, torch.empty(2, device=META))
    with pytest.raises(ValueError, match="activation: got 'swish', expected one of identity, relu, "):
        is_fused("swish", torch.empty(2))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("asked", [{"impl": "reference"}, {"dtype": torch.float64}, {"device": META}], ids=str)
def test_reference_for_float64_and_other_devices(activation, asked, used):
    call(activation=activation, **asked)
    assert not used


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_named_implementation_runs_or_raises(activation, used):
    for impl, reason in available_implementations(CPU).items():
        used.clear()
        if reason:
            with pytest.raises(ValueError, match=f"impl: '{impl}' "):
                call(activation=activation, impl=impl)
            assert not used
        else:
            call(activation=activation, impl=impl)
            assert used == ([] if impl == "reference" else [impl])


def test_available_implementations():
    for device in (CPU, CUDA, META):
        reasons = available_implementations(device)
        assert list(reasons) == ["triton", "numba", "reference"]
        assert all("\n" not in reason for reason in reasons.values())
        assert reasons["reference"] == ""
    assert available_implementations(CPU)["numba"] == ""
    assert available_implementations(CUDA)["numba"] == "runs on CPU tensors, not on cuda"
    assert available_implementations(CUDA)["triton"] == ("" if torch.cuda.is_available() else "PyTorch sees no GPU")
    assert available_implementations(META)["triton"].startswith("runs on CUDA tensors, not on meta")


@pytest.mark.parametrize("missing", ["numba", "triton"])
def test_missing_package_is_the_reason(missing, used, monkeypatch):
    monkeypatch.setattr(shared_dispatch, "_is_installed", lambda package: package != missing)
    monkeypatch.setattr(dispatch, "_implementation", dispatch._implementation.__wrapped__)
    for device in (CPU, CUDA):
        assert available_implementations(device)[missing] == f"{missing} is not installed"
    with pytest.raises(ValueError, match=f"impl: '{missing}' {missing} is not installed"):
        call(impl=missing)
    call(impl="auto")
    assert used == ([] if missing == "numba" else ["numba"])


def run(program):
    subprocess.run([sys.executable, "-c", program], check=True)


def test_import_loads_no_compiler():
    run(
        "import os, sys, torch; before = dict(os.environ), set(sys.modules); import fastentropy_kernels;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before[1]};"
        "assert not {'numba', 'triton'} & new and dict(os.environ) == before[0], new;"
        "assert not any(name.startswith('fastentropy_kernels') and name.endswith(('_triton', '_numba'))"
        " for name in sys.modules)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["numba", "triton"])
def test_works_without_a_package(missing):
    run(
        f"import sys; sys.modules['{missing}'] = None; import torch, fastentropy_kernels as k;"
        f"k.dispatch._is_installed = lambda package: package != '{missing}';"
        "c = torch.zeros(3, 3, dtype=torch.int64); k.count_states(torch.ones(2, 3), c); assert c.sum() == 6;"
        "y = k.activation_states(torch.ones(2, 3), c, 'relu'); assert c.sum() == 12 and y.sum() == 6;"
        f"assert k.is_fused('relu', torch.ones(2)) == ('{missing}' != 'numba');"
        f"assert k.available_implementations(torch.device('cpu'))['{missing}'] == '{missing} is not installed'"
    )
