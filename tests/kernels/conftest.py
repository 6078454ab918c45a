"""Fixtures of the tests of the kernels."""

import pytest
import torch


@pytest.fixture(scope="module")
def poisoned_memory():
    """Memory from torch.empty holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
