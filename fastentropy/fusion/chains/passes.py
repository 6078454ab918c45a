"""Rewrites of a chain that keep it a chain: folding, moving pools, choosing fused kernels."""

from collections.abc import Sequence
from dataclasses import replace

from fastentropy.fusion.chains.affine import AffineOperator, compose
from fastentropy.fusion.chains.elements import Chain, Element, FusedPair, Sum
from fastentropy_kernels import MOST_MIDDLES


def fold(chain: Chain) -> Chain:
    """Compose every operator that only scales and shifts channels (a batch norm) with its neighbour, where that is exact."""
    folded: list[Element] = []
    for element in chain:
        previous = folded[-1] if folded else None
        if isinstance(element, Sum):
            folded.append(Sum(tuple(fold(branch) for branch in element.branches)))
        elif isinstance(previous, AffineOperator) and isinstance(element, AffineOperator) and _folds(previous, element):
            folded[-1] = compose(previous, element)
        else:
            folded.append(element)
    return tuple(folded)


def _folds(first: AffineOperator, second: AffineOperator) -> bool:
    """Whether one of two operators is a scale that the other can take, at the border too; an average stays one."""
    if first.is_average or second.is_average:
        return False
    return second.is_channelwise or (first.is_channelwise and not pads(second))


def move_pools_forward(chain: Chain) -> Chain:
    """The chain with every unpadded average pooling moved before the pointwise operators that it follows.

    A mean of affine values is the affine value of the mean.
    """
    moved: list[Element] = []
    for element in chain:
        place = len(moved)
        if isinstance(element, AffineOperator) and element.is_average and not _is_padded(element):
            while place and (pointwise := _pointwise_before(moved, place)):
                element, place = _average_of(element, pointwise.in_channels), place - 1
        moved.insert(place, element)
    return tuple(moved)


def _pointwise_before(moved: Sequence[Element], place: int) -> AffineOperator | None:
    before = moved[place - 1]
    return before if isinstance(before, AffineOperator) and before.is_pointwise and before.bias.ndim == 1 else None


def _average_of(pool: AffineOperator, channels: int) -> AffineOperator:
    """The same pooling for another number of channels."""
    weight = pool.weight[:1].expand(channels, *pool.weight.shape[1:]).contiguous()
    return replace(pool, weight=weight, bias=pool.bias.new_zeros(channels), groups=channels)


def _is_padded(operator: AffineOperator) -> bool:
    return any(axis.before or axis.after for axis in operator.axes)


def without_residual(chain: Chain) -> tuple[Chain, bool]:
    """A chain, or the branch of a chain that only adds a branch to the value itself."""
    if len(chain) == 1 and isinstance(chain[0], Sum):
        branches = [branch for branch in chain[0].branches if branch]
        if len(branches) == 1 and len(chain[0].branches) == 2:
            return branches[0], True
    return chain, False


def pads(operator: AffineOperator) -> bool:
    """Return whether an operator reads zeros that its input does not hold: padding, or those that upsampling inserts."""
    return any(axis.before > 0 or axis.after > 0 or axis.upsampling > 1 for axis in operator.axes)


def fuse_pairs(chain: Chain) -> Chain:
    """The chain with each pair of neighbours that a fused kernel computes in one, and the input that is added to it."""
    paired: list[Element] = []
    for element in chain:
        previous = paired[-1] if paired else None
        if isinstance(previous, AffineOperator) and (kernel := _kernel(previous, element)):
            paired[-1] = kernel
        else:
            paired.append(_kernels_of_branches(element) if isinstance(element, Sum) else element)
    return tuple(paired)


def _kernels_of_branches(element: Sum) -> Element:
    branches = tuple(fuse_pairs(branch) for branch in element.branches)
    body, adds_value = without_residual((Sum(branches),))
    if adds_value and len(body) == 1 and isinstance(body[0], FusedPair):
        return replace(body[0], adds_input=True)
    return element if branches == element.branches else Sum(branches)


def _kernel(first: AffineOperator, second: Element) -> FusedPair | None:
    """The kernel of `fastentropy_kernels` that computes one operator after the other, if there is one."""
    if not isinstance(second, AffineOperator) or first.bias.ndim > 1 or second.bias.ndim > 1:
        return None
    if not first.axes:
        return FusedPair("linear_pair", first, second) if first.out_channels <= MOST_MIDDLES else None
    plain = all(axis.upsampling == 1 and axis.before == axis.after >= 0 for axis in first.axes)
    spread = first.groups in (1, first.in_channels) and (first.groups == 1 or first.in_channels == first.out_channels)
    pointwise = second.is_pointwise and second.groups == 1
    return FusedPair("conv_pointwise", first, second) if len(first.axes) == 2 and plain and spread and pointwise else None
