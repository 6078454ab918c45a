"""Merge a chain (a stretch of linear operators) into one operator that computes the same values at every position.

Composing the operators is exact except near the borders, if an operator inside the chain pads its input with zeros. If all
operators before that padding are pointwise, only the bias differs there. The bias then becomes a map with one value for each
position. Otherwise the outputs near the border are recomputed with the chain (see `borders`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fastentropy.fusion.chains.affine import AffineOperator, add, compose, identity, stack
from fastentropy.fusion.chains.bias_maps import ZeroResponse, zero_response
from fastentropy.fusion.chains.borders import border_strips, differs_at_border
from fastentropy.fusion.chains.elements import (
    BorderCorrected,
    Chain,
    Concatenation,
    Element,
    Flatten,
    Parallel,
    TapBiased,
    operators,
)
from fastentropy.fusion.chains.passes import split_residual
from fastentropy.fusion.chains.selections import Selection

#: "exact": the merged operator equals the chain at every position. "train": it differs near the border, and the fused model
#: is meant to be trained afterwards.
Borders: TypeAlias = Literal["exact", "train"]


def merge(
    chain: Chain,
    spatial_size: Sequence[int] | None,
    borders: Borders = "exact",
    composed: Callable[[Chain], AffineOperator] | None = None,
) -> Chain:
    """Merge a chain into one operator that equals the chain at every position.

    The bias of the operator is the output of the chain for an input of zeros. If that output differs near the border, the bias
    is a map with one value for each position, of which large ones are stored as slabs (`BiasSlab`). If more than the bias
    differs near the border, the outputs there are recomputed with the chain (`BorderCorrected`).

    Args:
        chain: affine operators and sums of them, and possibly a `Flatten` at the end, which is kept.
        spatial_size: the size of the inputs along each spatial axis, or None if they may have any size.
        borders: with "train", all zero padding moves to the front of the chain, as in the literature (Fu et al., ICML 2022;
            Kim et al., ICML 2023 and 2024). The result then differs from the chain near the border.
        composed: returns the operator of a chain; the default is `compose_chain`. With `placeholder_weights`, the result has
            the right shapes but the wrong values, and serves for timing only.

    Returns:
        The merged chain: one element, followed by the `Flatten` if there is one.

    Raises:
        ValueError: the chain cannot be merged; the message is the reason.
    """
    body = chain[:-1] if isinstance(chain[-1], Flatten) else chain
    merged, tail = (composed or compose_chain)(body), chain[len(body) :]
    if not merged.axes:
        return (merged, *tail)
    if spatial_size is None:
        return (merged if borders == "train" else _for_every_size(body, merged), *tail)
    if borders == "train":
        return (crop_kernel(merged, spatial_size), *tail)
    strips = border_strips(body, spatial_size)
    response = zero_response(body, spatial_size)
    if response.differs(merged.bias, strips):
        merged = _with_bias_map(merged, response)
    merged = crop_kernel(merged, spatial_size)
    return (BorderCorrected(merged, body, strips) if strips else merged, *tail)


def _with_bias_map(merged: AffineOperator, response: ZeroResponse) -> AffineOperator:
    """Return a merged operator with the bias of each position: as a map if that is no larger than the weight, else as slabs."""
    if None in response.interiors or response.numel() <= merged.weight.numel():
        return replace(merged, bias=response.expanded())
    return replace(merged, border_bias=tuple(response.slabs()))


def _for_every_size(chain: Chain, merged: AffineOperator) -> Element:
    """Return an element that equals a chain for inputs of every size, given the chain's composition `merged`.

    Raises ValueError if more than a bias differs near the border.
    """
    axes = range(len(merged.axes))
    if any(differs_at_border(chain, axis, zero_input=False) for axis in axes):
        raise ValueError("inner zero padding: where the border is depends on the size, which is free")
    return with_tap_bias(chain) if any(differs_at_border(chain, axis, zero_input=True) for axis in axes) else merged


def crop_kernel(operator: AffineOperator, spatial_size: Sequence[int]) -> AffineOperator:
    """Replace an operator by one whose kernel covers exactly its input, if its output has a single position.

    Taps that read nothing but padding are dropped by this. Every other operator, and every operator with upsampling, is
    returned as it is.

    Args:
        operator: the operator.
        spatial_size: size of its input along each spatial axis.
    """
    single = all(axis.output_size(size) == 1 for axis, size in zip(operator.axes, spatial_size, strict=True))
    if not operator.axes or not single or any(axis.upsampling > 1 for axis in operator.axes):
        return operator
    weight = operator.weight.new_zeros((*operator.weight.shape[:2], *spatial_size))
    inside = [
        [tap for tap in range(axis.kernel) if 0 <= tap * axis.dilation - axis.before < size]
        for axis, size in zip(operator.axes, spatial_size, strict=True)
    ]
    if all(inside):
        taps: Any = (..., *(slice(each[0], each[-1] + 1) for each in inside))
        starts = [each[0] * axis.dilation - axis.before for each, axis in zip(inside, operator.axes, strict=True)]
        positions: Any = (..., *(slice(n, None, a.dilation) for n, a in zip(starts, operator.axes, strict=True)))
        weight[positions][tuple(slice(0, n) for n in operator.weight[taps].shape)] = operator.weight[taps]
    ones = (1,) * len(operator.axes)
    bias = operator.bias.flatten(1)[:, 0] if operator.bias.ndim > 1 else operator.bias
    return AffineOperator(weight, bias, ones, (0,) * len(ones), ones, operator.groups)


def compose_chain(chain: Chain, dtype: torch.dtype = torch.float64) -> AffineOperator:
    """Compose all elements of a chain into one operator in float64. It is exact except near the borders.

    Args:
        chain: the chain.
        dtype: the dtype in which the composed weight is stored.

    Returns:
        The operator. Its weight is that of the chain if there is nothing to compose.

    Raises:
        ValueError: the composition is not an operator.
    """
    joined = [_join_branches(element) for element in chain]
    if len(joined) == 1:
        return joined[0].as_convolution() if isinstance(joined[0], Selection) else joined[0]
    if _is_cheaper_backwards(joined):
        first, *others = joined
        return compose(first, functools.reduce(lambda later, earlier: compose(earlier, later), reversed(others)), dtype)
    *others, last = joined
    return compose(functools.reduce(compose, others), last, dtype)


def _is_cheaper_backwards(chain: Sequence[AffineOperator]) -> bool:
    """Return whether linear layers need fewer multiplications if they are composed from the last one to the first."""
    if any(operator.axes for operator in chain):
        return False
    sizes = [operator.in_channels * operator.out_channels for operator in chain]
    return chain[-1].out_channels * sum(sizes[:-1]) < chain[0].in_channels * sum(sizes[1:])


def _join_branches(element: Element) -> AffineOperator:
    """Return an affine operator as it is, and a sum or a concatenation of branches as one operator."""
    if not isinstance(element, Parallel):
        assert isinstance(element, AffineOperator)
        return element
    branches = [compose_chain(branch) if branch else None for branch in element.branches]
    like = next(operator for operator in branches if operator is not None)
    total, *others = (identity(like.in_channels, like) if operator is None else operator for operator in branches)
    if isinstance(element, Concatenation):
        return stack([total, *others])
    for other in others:
        total = add(total, other)
    return total


def composed_shape(chain: Chain) -> AffineOperator:
    """Return `compose_chain` of a chain on the meta device, which has shapes only and needs no memory or arithmetic.

    Raises:
        ValueError: the composition is not an operator.
    """
    return compose_chain(_with_each(chain, _on_meta))


def placeholder_weights(chain: Chain) -> AffineOperator:
    """Return `compose_chain` of a chain with its true bias and a weight of zeros that takes no memory, for timing.

    Composing the true weight would take longer than timing the operator.
    """
    shape, first = composed_shape(chain), operators(chain)[0]
    weight = torch.zeros((), dtype=torch.float32, device=first.bias.device).expand(shape.weight.shape)
    return replace(shape, weight=weight, bias=_at_constant(chain, first.bias.new_zeros(first.in_channels)))


def _at_constant(chain: Chain, values: Tensor) -> Tensor:
    """Return the output of a chain, far from any border, for an input that is constant per channel, `[channels]`."""
    for element in chain:
        if isinstance(element, Parallel):
            outputs = [_at_constant(branch, values) for branch in element.branches]
            values = torch.cat(outputs) if isinstance(element, Concatenation) else torch.stack(outputs).sum(0)
        else:
            assert isinstance(element, AffineOperator)
            values = element.at_constant(values)
    return values


def _with_each(chain: Chain, change: Callable[[AffineOperator], AffineOperator]) -> Chain:
    """Return a chain with `change` applied to each of its operators, including those inside branches."""

    def changed(element: Element) -> Element:
        if isinstance(element, Parallel):
            return replace(element, branches=tuple(_with_each(branch, change) for branch in element.branches))
        assert isinstance(element, AffineOperator)
        return change(element)

    return tuple(map(changed, chain))


def _on_meta(operator: AffineOperator) -> AffineOperator:
    """Return an operator whose weight and bias are on the meta device."""
    return replace(operator, weight=operator.weight.to("meta"), bias=operator.bias.to("meta"))


def with_tap_bias(chain: Chain) -> TapBiased:
    """Merge pointwise operators and the operators after them into one operator that is exact for inputs of every size.

    Args:
        chain: pointwise operators, then one operator that may pad its input, then operators without padding. A residual block
            whose branch is such a chain is possible too.

    Raises:
        ValueError: the chain is not of that kind, or the merged operator does not read the input that the block adds.
    """
    body, adds_input = split_residual(chain)
    count = next((index for index, element in enumerate(body) if not _is_pointwise(element)), len(body))
    if not 0 < count < len(body):
        raise ValueError("no pointwise operators with others behind them")
    head, (padded, *others) = compose_chain(body[:count]), body[count:]
    if isinstance(padded, Parallel) or not all(isinstance(each, AffineOperator) and not each.reads_zeros for each in others):
        raise ValueError("inner zero padding: more than a bias differs at the border")
    rest = compose_chain((padded, *others))
    grouped = rest.weight.double().reshape(rest.groups, -1, *rest.weight.shape[1:])
    tap_bias = torch.einsum("goi...,gi->go...", grouped, head.bias.reshape(rest.groups, -1)).flatten(0, 1)
    merged = replace(compose(head, rest), bias=rest.bias)
    if adds_input:
        whole = add(merged, identity(merged.in_channels, merged))
        if whole.axes != merged.axes:
            raise ValueError("the added input is read beyond the taps of the merged operator")
        merged = whole
    return TapBiased(merged, tap_bias)


def _is_pointwise(element: Element) -> bool:
    """Return whether an element is a convolution that reads one input position for each output position."""
    return isinstance(element, AffineOperator) and bool(element.axes) and element.is_pointwise
