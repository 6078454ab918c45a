"""Compare a rewritten network with the network on samples: given and random inputs, at several batch sizes."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import tree_leaves
from fastentropy.fusion.inputs import (
    Inputs,
    batch_size,
    clone,
    is_float,
    random_like,
    to_double,
    with_batch_size,
    with_longer_axes,
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference at any position, divided by the largest finite absolute value expected.

    The error is infinite if the shapes differ, or if a position is NaN or infinite in one of the two only.
    """
    if actual.shape != expected.shape:
        return torch.inf
    if not expected.numel():
        return 0.0
    actual = actual.to(expected)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual - expected).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0)
    scale = expected.abs().nan_to_num(0, 0, 0).max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float(difference.max() / scale)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: the rounding of tf32, in which a GPU may compute them, would hide other errors."""
    # PyTorch adds `conv` at import, which its annotations do not show.
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


#: The largest relative error that a fused model may have by default, by the dtype of its weights.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class EquivalenceCheck:
    """The outputs of a model on sample inputs, which another form of it must reproduce."""

    def __init__(self, model: nn.Module, example_inputs: Inputs, takes: Callable[[Inputs], bool], tolerance: float) -> None:
        """Run the model on the example inputs and on random ones.

        Where `takes` accepts them, it also runs on random inputs at two other batch sizes and on inputs longer by one.
        """
        batch = batch_size(example_inputs) or 0
        others = [random_like(with_batch_size(example_inputs, n), seed=n) for n in sorted({1, batch + 1} - {batch})]
        others.append(with_longer_axes(example_inputs))
        cases = [(inputs, _outputs(model, inputs)) for inputs in others if takes(inputs)]
        always = [(inputs, _outputs(model, inputs)) for inputs in (example_inputs, random_like(example_inputs, seed=0))]
        self._cases = always + [(inputs, outputs) for inputs, outputs in cases if outputs is not None]
        self._model, self._tolerance = model, tolerance

    def error(self, form: Callable[..., Any]) -> float:
        """Return the largest relative error of any output of a form on any of the inputs.

        A network can amplify rounding so much that its own outputs are far from exact. Where a form differs by more than the
        tolerance, its outputs are therefore compared with those of the model in float64, if that runs.
        """
        return max(self._case_error(_outputs(form, inputs), inputs, expected) for inputs, expected in self._cases)

    def holds_for_one(self, form: Callable[..., Any]) -> bool:
        """Return whether a form was compared on a batch of one and is within the tolerance there.

        A trace made at other batch sizes may lack a branch that the model takes for a batch of one.
        """
        single = [(inputs, expected) for inputs, expected in self._cases if batch_size(inputs) == 1]
        return bool(single) and all(
            self._case_error(_outputs(form, inputs), inputs, expected) <= self._tolerance for inputs, expected in single
        )

    def leave_out_one(self) -> None:
        """Do not compare on a batch of one from now on."""
        self._cases = [(inputs, expected) for inputs, expected in self._cases if batch_size(inputs) != 1]

    def _case_error(self, actual: list[Any] | None, inputs: Inputs, expected: list[Any] | None) -> float:
        error = largest_error(actual, expected)
        if error <= self._tolerance or (double := _in_double(self._model)) is None:
            return error
        return min(error, largest_error(actual, _outputs(double, to_double(inputs))))


def largest_error(actual: list[Any] | None, expected: list[Any] | None) -> float:
    """Return the largest relative error of any pair of outputs; infinite if a call failed or gave another number of outputs."""
    if actual is None or expected is None or len(actual) != len(expected):
        return torch.inf
    return max(map(_error, actual, expected), default=0.0)


def _error(actual: Any, expected: Any) -> float:
    """Return the relative error of a floating-point tensor; for any other value, 0 if it is the same and infinity if not."""
    if not isinstance(expected, Tensor):
        return 0.0 if actual == expected else torch.inf
    if is_float(expected) and is_float(actual):
        return relative_error(actual, expected)
    return 0.0 if actual.dtype == expected.dtype and torch.equal(actual, expected) else torch.inf


def _outputs(model: Callable[..., Any], inputs: Inputs) -> list[Any] | None:
    """Return the outputs of a call; None if it raises, as for a size that the model does not take or for lack of memory."""
    try:
        with full_precision():
            return tree_leaves(model(*clone(inputs)))
    except Exception:  # whatever a model raises
        return None


def _in_double(model: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(model).double()
    except Exception:  # no memory, or weights that do not convert
        return None
