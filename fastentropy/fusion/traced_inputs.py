"""Describe the inputs with which a program was traced: their structure, dtypes and constants, and the sizes they may have."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fastentropy._compat import tree_unflatten
from fastentropy.fusion.chains.nodes import fixed_size
from fastentropy.fusion.inputs import Inputs

#: The sizes that an axis may have: at least the first number and less than the second. None as the second means no limit.
Sizes = tuple[int, int | None]


class TracedInputs(NamedTuple):
    """The inputs of a trace.

    Attributes:
        values: the inputs in flat order. Each is a fake tensor (a shape without memory) or a constant.
        sizes: the sizes that each axis of each input may have, in the same order; None for an input that is not a tensor.
        structure: how the positional and the keyword inputs are nested.
    """

    values: tuple[Any, ...]
    sizes: tuple[tuple[Sizes, ...] | None, ...]
    structure: Any

    @classmethod
    def of(cls, program: ExportedProgram) -> "TracedInputs":
        """Return the inputs of a program."""
        placeholders = zip(program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True)
        values = tuple(node.meta.get("val") for spec, node in placeholders if spec.kind is InputKind.USER_INPUT)
        return cls(values, tuple(_sizes(value, program) for value in values), program.call_spec.in_spec)

    def free_axes(self) -> list[tuple[int, int]]:
        """Return the axes with free sizes, each as the index of an input in flat order and the index of its axis."""
        return [
            (index, axis)
            for index, each in enumerate(self.sizes)
            for axis, (low, high) in enumerate(each or ())
            if high is None or high > low + 1
        ]

    def sample(self) -> Inputs:
        """Return inputs with which the program can be called.

        Floating-point tensors are random, all other tensors are zeros, and each free size is the smallest allowed one from 2
        on.
        """
        generator = torch.Generator().manual_seed(0)

        def sample(value: Any, sizes: tuple[Sizes, ...] | None) -> Any:
            if sizes is None:
                return value
            shape = [low if high == low + 1 else max(low, 2) for low, high in sizes]
            if not value.is_floating_point():
                return torch.zeros(shape, dtype=value.dtype, device=value.device)
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(value.device, value.dtype)

        return self.nested(list(map(sample, self.values, self.sizes)))

    def nested(self, leaves: Sequence[Any]) -> Inputs:
        """Return values in flat order as the positional and keyword inputs of a call."""
        args, kwargs = tree_unflatten(list(leaves), self.structure)
        return Inputs(args, kwargs)


def fits(value: Any, sizes: tuple[Sizes, ...] | None) -> bool:
    """Return whether an input is a tensor whose sizes are all allowed.

    Args:
        value: the input.
        sizes: the allowed sizes per axis, or None to allow every value.
    """
    if sizes is None:
        return True
    if not isinstance(value, Tensor) or value.ndim != len(sizes):
        return False
    return all(low <= size and (high is None or size < high) for size, (low, high) in zip(value.shape, sizes, strict=True))


def _sizes(value: Any, program: ExportedProgram) -> tuple[Sizes, ...] | None:
    """Return the sizes that each axis of one input of a trace may have; None if it is not a tensor."""
    if not isinstance(value, Tensor):
        return None
    return tuple(_allowed(size, program) for size in value.shape)


def _allowed(size: int | torch.SymInt, program: ExportedProgram) -> Sizes:
    """Return the values that a size of a trace may have."""
    if (constant := fixed_size(size)) is not None:
        return constant, constant + 1
    assert isinstance(size, torch.SymInt)
    bounds = program.range_constraints.get(size.node.expr)
    lowest, highest = (int(bounds.lower), bounds.upper) if bounds else (0, None)
    limit = int(highest) + 1 if highest is not None and highest < sys.maxsize else None
    # A trace reports sizes from 2 on. Its guards decide whether it is also correct for 1.
    return 1 if lowest <= 2 else lowest, limit
