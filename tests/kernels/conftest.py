"""Fixtures of the tests of the kernels."""

import pytest
import torch

from fastentropy_kernels import activations_triton
from tests._helpers.interpreter import patch_once_a_launch


@pytest.fixture(scope="module")
def poisoned_memory():
    """Memory from torch.empty holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=activations_triton.INTERPRETED)
def fast_interpreter():
    """Launch kernels in Triton's interpreter without the work that it repeats for nothing."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_once_a_launch(monkeypatch)
        yield
