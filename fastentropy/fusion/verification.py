"""Compare the outputs of a rewritten network with those of the original, on given and random inputs of several sizes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastentropy.fusion.doubles import InDouble
from fastentropy.fusion.inputs import (
    Inputs,
    has_batch,
    is_float,
    outputs_of,
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


#: A form may be this many times as far from the model in float64 as the model itself is in its own precision.
OWN_ERROR_FACTOR = 10

#: Where a form may be further away than this, the outputs of the model are mostly rounding, and comparing them says little.
MOSTLY_ROUNDING = 0.5


class Judgement(NamedTuple):
    """The error of a form, and the error that it may have.

    Attributes:
        error: the largest relative error of an output. Where an output is above its bound, it is the error of that output.
        allowed: the largest error at which this output counts as equal.
        bound: where `allowed` comes from, as text.
    """

    error: float
    allowed: float
    bound: str

    @property
    def holds(self) -> bool:
        """Return whether the form counts as equal."""
        return self.error <= self.allowed

    @classmethod
    def worst(cls, judgements: Iterable[Judgement]) -> Judgement:
        """Return the judgement with the largest error among those that do not hold, or among all if all hold."""
        return max(judgements, key=lambda each: (not each.holds, each.error))


def judge(error: float, own_error: float, tolerance: float) -> Judgement:
    """Judge an error by the tolerance, or by the error that the original itself has in its precision, if that is larger.

    Rounding differs between two ways to compute the same, and a network may amplify it. It amplifies the errors of a form just
    as much, so their ratio stays: about one for an equal form, and larger for one that is wrong by more than rounding.

    Args:
        error: the relative error of the form.
        own_error: the relative error of the original against float64; 0 if it is unknown.
        tolerance: the largest relative error that is always allowed.
    """
    # An original that is not finite where the exact value is says nothing about other forms.
    scaled = OWN_ERROR_FACTOR * own_error if own_error < torch.inf else 0.0
    if scaled <= tolerance or error <= tolerance:
        return Judgement(error, tolerance, f"the tolerance of {tolerance:.0e}")
    return Judgement(error, scaled, f"{OWN_ERROR_FACTOR} times the rounding error of the model itself, {own_error:.0e}")


class _Case:
    """The inputs of one call, and what the model returns for them.

    Attributes:
        inputs: the inputs.
        expected: the outputs of the model in flat order, or None if its call failed.
        has_example_sizes: whether the inputs have the sizes of the example inputs.
    """

    def __init__(self, inputs: Inputs, expected: list[Any] | None, has_example_sizes: bool) -> None:
        self.inputs, self.expected, self.has_example_sizes = inputs, expected, has_example_sizes
        self._exact: list[Any] | None = None
        self._own_errors: list[float] | None = None

    def own_errors(self, double: InDouble | None) -> list[float]:
        """Return the relative error of each output of the model against the model in float64, which runs only once.

        The errors are unknown (an empty list) if there is no model in float64, or it does not run.
        """
        if self._own_errors is None:
            exact = _outputs(double, to_double(self.inputs)) if double is not None else None
            self._exact = exact if exact is not None and len(exact) == len(self.expected or ()) else None
            self._own_errors = errors_of(self.expected, self._exact) if self._exact else []
        return self._own_errors

    def errors(self, actual: list[Any] | None) -> list[float]:
        """Return the relative error of each output of a form: against the model, or in float64, whichever is smaller."""
        errors = errors_of(actual, self.expected)
        return list(map(min, errors, errors_of(actual, self._exact))) if self._exact else errors


class EquivalenceCheck:
    """A comparison of other forms of a model with the model, on sample inputs.

    The outputs of the model are computed once and stored. So are those of the model in float64, if a form needs them.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs, takes: Callable[[Inputs], bool], tolerance: float) -> None:
        """Run the model on the example inputs, on random inputs, and on inputs of other sizes.

        The other sizes are two further small batch sizes with random values, and the example inputs with each axis longer by
        one.
        They are left out if `takes` rejects them or the model raises on them.

        Args:
            model: the model in eval mode.
            example_inputs: the inputs of one call.
            takes: returns whether inputs have sizes that the trace of the model allows.
            tolerance: the largest relative error at which a form always counts as equal.
        """
        batch = example_inputs.batch or 0
        sizes = {1, batch + 1 if batch <= 3 else 3} - {batch}
        others = [random_like(with_batch_size(example_inputs, n), seed=n) for n in sorted(sizes)]
        others.append(with_longer_axes(example_inputs))
        tried = [example_inputs, random_like(example_inputs, seed=0), *filter(takes, others)]
        cases = [_Case(inputs, _outputs(model, inputs), index < 2) for index, inputs in enumerate(tried)]
        self.tolerance, self._model = tolerance, model
        self._cases = cases[:1] + [case for case in cases[1:] if case.expected is not None]

    @functools.cached_property
    def _double(self) -> InDouble | None:
        """Return the model in float64; None if it cannot be copied or is in float64 already."""
        if {value.dtype for value in self._model.parameters()} == {torch.float64}:
            return None
        try:
            return InDouble(self._model)
        except Exception:  # an attribute that cannot be copied
            return None

    def judge(self, form: Callable[..., Any], other_sizes: bool = True) -> Judgement:
        """Return the largest relative error of any output of a form on any of the inputs, and the error that is allowed.

        A network can amplify rounding so much that its own outputs are far from exact. If a form differs by more than the
        tolerance, it is therefore also compared with the model in float64 (if the model runs in float64). The smaller error
        counts, and it may be as large as `judge` allows for the error that the model itself has there.

        Args:
            form: called with the same inputs as the model.
            other_sizes: whether to compare on inputs of other sizes than the example inputs, too.
        """
        return self._judged(form, [case for case in self._cases if other_sizes or case.has_example_sizes])

    def error(self, form: Callable[..., Any]) -> float:
        """Return the largest relative error of any output of a form on any of the inputs; see `judge`."""
        return self.judge(form).error

    def holds_for_one(self, form: Callable[..., Any]) -> bool:
        """Return whether a form was compared with the model on a batch of one and counts as equal there.

        A model can take another branch for a batch of one. A trace that was made at another batch size lacks this branch.

        Args:
            form: called with the same inputs as the model.
        """
        single = [case for case in self._cases if case.inputs.batch == 1]
        return bool(single) and self._judged(form, single).holds

    @functools.cached_property
    def is_random(self) -> bool:
        """Return whether a second call of the model on the example inputs differs by more than the tolerance."""
        first = self._cases[0]
        return not largest_error(_outputs(self._model, first.inputs), first.expected) <= self.tolerance

    def leave_out_one(self) -> None:
        """Leave the inputs with a batch of one out of all later comparisons."""
        self._cases = [case for case in self._cases if case.inputs.batch != 1]

    def smallest_inputs(self) -> list[Inputs]:
        """Return the inputs of the smallest batch among those that were compared, for each set of the other sizes."""
        smallest: dict[tuple[Any, ...], Inputs] = {}
        for inputs in sorted((case.inputs for case in self._cases), key=lambda inputs: inputs.batch or 0):
            sizes = tuple(value.shape[has_batch(value, inputs.batch) :] for value in inputs.leaves if isinstance(value, Tensor))
            smallest.setdefault(sizes, inputs)
        return list(smallest.values())

    def _judged(self, form: Callable[..., Any], cases: list[_Case]) -> Judgement:
        """Judge a form on some of the inputs: by its worst output, and the largest errors of form and model there."""
        errors, own_errors = [], []
        for case in cases:
            actual = _outputs(form, case.inputs)
            found = errors_of(actual, case.expected)
            if not max(found, default=0.0) <= self.tolerance and not self.is_random:
                own_errors.append(case.own_errors(self._double))
                found = case.errors(actual)
            errors.append(found)
        largest = [max(each) for each in zip_longest(*errors, fillvalue=0.0)]
        own = [max(each) for each in zip_longest(*own_errors, fillvalue=0.0)]
        judged = [judge(*pair, self.tolerance) for pair in zip_longest(largest, own, fillvalue=0.0)]
        return Judgement.worst(judged or [judge(0.0, 0.0, self.tolerance)])


def largest_error(actual: list[Any] | None, expected: list[Any] | None) -> float:
    """Return the largest relative error of any pair of outputs.

    It is infinite if a call failed (its outputs are None) or the numbers of outputs differ.
    """
    return max(errors_of(actual, expected), default=0.0)


def errors_of(actual: list[Any] | None, expected: list[Any] | None) -> list[float]:
    """Return the relative error of each pair of outputs; see `largest_error`."""
    if actual is None or expected is None or len(actual) != len(expected):
        return [torch.inf] * max(1, len(expected or ()))
    return list(map(_error, actual, expected))


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
            return outputs_of(model, inputs)
    except Exception:  # whatever a model raises
        return None
