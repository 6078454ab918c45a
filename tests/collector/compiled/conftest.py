"""Each test begins without compiled code."""

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def _without_compiled_code():
    torch._dynamo.reset()
    counters.clear()
