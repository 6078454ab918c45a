"""Rewrites of a chain that keep its function: fold batch norm, move pools forward, run pairs of operators in one kernel."""

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
        elif isinstance(previous, AffineOperator) and isinstance(element, AffineOperator) and _can_fold(previous, element):
            folded[-1] = compose(previous, element)
        else:
            folded.append(element)
    return tuple(folded)


def _can_fold(first: AffineOperator, second: AffineOperator) -> bool:
    """Return whether one operator is a scale that the other can take, at the border too; average pooling takes none."""
    if first.is_average or second.is_average:
        return False
    return second.is_channelwise or (first.is_channelwise and not second.reads_zeros)


def move_pools_forward(chain: Chain) -> Chain:
    """Move every unpadded average pooling before the pointwise operators that it follows.

    This keeps the function, because the mean of affine values is the affine value of the mean.
    """
    moved: list[Element] = []
    for element in chain:
        position = len(moved)
        if isinstance(element, AffineOperator) and element.is_average and not _is_padded(element):
            while position and (pointwise := _as_pointwise(moved[position - 1])):
                element, position = _with_channels(element, pointwise.in_channels), position - 1
        moved.insert(position, element)
    return tuple(moved)


def _is_padded(operator: AffineOperator) -> bool:
    return any(axis.before or axis.after for axis in operator.axes)


def _as_pointwise(element: Element) -> AffineOperator | None:
    """Return the element if it is a pointwise operator without a bias map."""
    return element if isinstance(element, AffineOperator) and element.is_pointwise and element.bias.ndim == 1 else None


def _with_channels(pool: AffineOperator, channels: int) -> AffineOperator:
    """Return the same pooling for another number of channels."""
    weight = pool.weight[:1].expand(channels, *pool.weight.shape[1:]).contiguous()
    return replace(pool, weight=weight, bias=pool.bias.new_zeros(channels), groups=channels)


def split_residual(chain: Chain) -> tuple[Chain, bool]:
    """Return the branch of a chain that only adds one branch to its input, and True; any other chain as it is, and False."""
    if len(chain) == 1 and isinstance(chain[0], Sum):
        branches = [branch for branch in chain[0].branches if branch]
        if len(branches) == 1 and len(chain[0].branches) == 2:
            return branches[0], True
    return chain, False


def fuse_pairs(chain: Chain) -> Chain:
    """Replace neighbouring operators by a `FusedPair` wherever a kernel computes both, with the input that is added to it."""
    paired: list[Element] = []
    for element in chain:
        previous = paired[-1] if paired else None
        if isinstance(previous, AffineOperator) and (pair := _fused_pair(previous, element)):
            paired[-1] = pair
        else:
            paired.append(_fuse_in_branches(element) if isinstance(element, Sum) else element)
    return tuple(paired)


def _fuse_in_branches(element: Sum) -> Element:
    branches = tuple(fuse_pairs(branch) for branch in element.branches)
    body, adds_input = split_residual((Sum(branches),))
    if adds_input and len(body) == 1 and isinstance(body[0], FusedPair):
        return replace(body[0], adds_input=True)
    return element if branches == element.branches else Sum(branches)


def _fused_pair(first: AffineOperator, second: Element) -> FusedPair | None:
    """Return both operators as one kernel of `fastentropy_kernels`, or None if there is no kernel for them."""
    if not isinstance(second, AffineOperator) or first.bias.ndim > 1 or second.bias.ndim > 1:
        return None
    if not first.axes:
        return FusedPair("linear_pair", first, second) if first.out_channels <= MOST_MIDDLES else None
    symmetric = all(axis.upsampling == 1 and axis.before == axis.after >= 0 for axis in first.axes)
    dense_or_depthwise = first.groups == 1 or first.groups == first.in_channels == first.out_channels
    pointwise = second.is_pointwise and second.groups == 1
    if len(first.axes) == 2 and symmetric and dense_or_depthwise and pointwise:
        return FusedPair("conv_pointwise", first, second)
    return None
