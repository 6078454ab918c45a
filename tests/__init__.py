"""Tests of both packages."""

import pytest

# An assertion that fails in a helper then shows its values, as one in a test does.
pytest.register_assert_rewrite("tests._helpers")
