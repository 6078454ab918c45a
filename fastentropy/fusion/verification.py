"""Compare the outputs of a rewritten network with those of the original, on given and random inputs of several sizes."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import tree_leaves
from fastentropy.fusion.inputs import (
    Inputs,
    clone,
    is_float,
    random_like,
    to_double,
    with_batch_size,
    with_longer_axes,
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference between two tensors, divided by the largest finite absolute value of `expected`.

    The error is infinite if the shapes differ, if an element is NaN in only one of the two, or if an element is infinite in one
    and not the same in the other.

    Args:
        actual: the tensor to judge; it is converted to the dtype of `expected`.
        expected: the reference, floating point.
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
    """Turn TF32 off for convolutions and matrix products while the context is active.

    The rounding of TF32 would hide other errors.
    """
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
    """A comparison of other forms of a model with the model, on sample inputs.

    The outputs of the model are computed once and stored.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs, takes: Callable[[Inputs], bool], tolerance: float) -> None:
        """Run the model on the example inputs, on random inputs, and on inputs of other sizes.

        The other sizes are two further batch sizes with random values, and the example inputs with each axis longer by one.
        They are left out if `takes` rejects them or the model raises on them.

        Args:
            model: the model in eval mode.
            example_inputs: the inputs of one call.
            takes: returns whether inputs have sizes that the trace of the model allows.
            tolerance: the largest relative error at which a form counts as equal.
        """
        batch = example_inputs.batch or 0
        others = [random_like(with_batch_size(example_inputs, n), seed=n) for n in sorted({1, batch + 1} - {batch})]
        others.append(with_longer_axes(example_inputs))
        cases = [(inputs, _outputs(model, inputs)) for inputs in others if takes(inputs)]
        always = [(inputs, _outputs(model, inputs)) for inputs in (example_inputs, random_like(example_inputs, seed=0))]
        self._cases = always + [(inputs, outputs) for inputs, outputs in cases if outputs is not None]
        self._model, self._tolerance = model, tolerance

    def error(self, form: Callable[..., Any], other_sizes: bool = True) -> float:
        """Return the largest relative error of any output of a form on any of the inputs.

        A network can amplify rounding so much that its own outputs are far from exact. If a form differs by more than the
        tolerance, it is therefore also compared with the model in float64 (if the model runs in float64), and the smaller error
        counts.

        Args:
            form: called with the same inputs as the model.
            other_sizes: whether to compare on inputs of other sizes than the example inputs, too.
        """
        cases = self._cases if other_sizes else self._cases[:2]
        return max(self._case_error(_outputs(form, inputs), inputs, expected) for inputs, expected in cases)

    def holds_for_one(self, form: Callable[..., Any]) -> bool:
        """Return whether a form was compared with the model on a batch of one and is within the tolerance there.

        A model can take another branch for a batch of one. A trace that was made at another batch size lacks this branch.

        Args:
            form: called with the same inputs as the model.
        """
        single = [(inputs, expected) for inputs, expected in self._cases if inputs.batch == 1]
        return bool(single) and all(
            self._case_error(_outputs(form, inputs), inputs, expected) <= self._tolerance for inputs, expected in single
        )

    def leave_out_one(self) -> None:
        """Leave the inputs with a batch of one out of all later comparisons."""
        self._cases = [(inputs, expected) for inputs, expected in self._cases if inputs.batch != 1]

    def _case_error(self, actual: list[Any] | None, inputs: Inputs, expected: list[Any] | None) -> float:
        """Return the relative error of the outputs of one call; see `error`.

        Args:
            actual: the outputs of the form under test (such as the fused network), or None if its call failed.
            inputs: the arguments of the call.
            expected: the outputs of the original model on the same inputs, or None if its call failed.
        """
        error = largest_error(actual, expected)
        if error <= self._tolerance or (double := _in_double(self._model)) is None:
            return error
        return min(error, largest_error(actual, _outputs(double, to_double(inputs))))


def largest_error(actual: list[Any] | None, expected: list[Any] | None) -> float:
    """Return the largest relative error of any pair of outputs.

    It is infinite if a call failed (its outputs are None) or the numbers of outputs differ.
    """
    if actual is None or expected is None or len(actual) != len(expected):
        return torch.inf
    return max(map(_error, actual, expected), default=0.0)


def _error(actual: Any, expected: Any) -> float:
    """Return the relative error of one output if it is a floating-point tensor. Otherwise return 0 if it is equal, else inf."""
    if not isinstance(expected, Tensor):
        return 0.0 if actual == expected else torch.inf
    if is_float(expected) and is_float(actual):
        return relative_error(actual, expected)
    return 0.0 if actual.dtype == expected.dtype and torch.equal(actual, expected) else torch.inf


def _outputs(model: Callable[..., Any], inputs: Inputs) -> list[Any] | None:
    """Return the outputs of a call in flat order, or None if the call raises an exception.

    A call raises if, for example, the model does not allow a size or the memory does not suffice.
    """
    try:
        with full_precision():
            copied = clone(inputs)
            return tree_leaves(model(*copied.args, **copied.kwargs))
    except Exception:  # whatever a model raises
        return None


def _in_double(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model in float64, or None if it cannot be made."""
    try:
        return copy.deepcopy(model).double()
    except Exception:  # no memory, or weights that do not convert
        return None
