"""Rewrite a chain without changing its function: fold batch norm and padding, move pooling, pair kernels, round weights.

A chain is a stretch of linear operators.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastentropy.fusion.chains.affine import AffineOperator, compose
from fastentropy.fusion.chains.elements import (
    Activation,
    BorderCorrected,
    Chain,
    Concatenation,
    Element,
    Flatten,
    FusedPair,
    Parallel,
    Sum,
    TapBiased,
)
from fastentropy.fusion.chains.selections import Selection, Window, repeated_positions
from fastentropy_kernels import MOST_MIDDLES


def fold(chain: Chain) -> Chain:
    """Fold batch norm and padding: compose each operator that only scales and shifts channels, pads or crops with a neighbour.

    This is done where it is exact. The branches of sums and concatenations are folded too.
    """
    folded: list[Element] = []
    for element in chain:
        if isinstance(element, Parallel):
            folded.append(replace(element, branches=tuple(map(fold, element.branches))))
        else:
            folded.append(element)
        while len(folded) > 1 and (composed := _folded(*folded[-2:])):
            folded[-2:] = [composed]
    return tuple(folded)


def _folded(first: Element, second: Element) -> AffineOperator | None:
    """Return two neighbours as one operator if one of them can be folded into the other, exactly at the border too."""
    if not isinstance(first, AffineOperator) or not isinstance(second, AffineOperator):
        return None
    can_fold = _can_fold_window if isinstance(first, Window) or isinstance(second, Window) else _can_fold
    return compose(first, second) if can_fold(first, second) else None


def _can_fold(first: AffineOperator, second: AffineOperator) -> bool:
    """Return whether one of two neighbours only scales and shifts channels, and composing the two is exact at the border too.

    Average pooling and selections are never composed, because they would become convolutions.
    """
    if isinstance(first, Selection) or isinstance(second, Selection) or first.is_average or second.is_average:
        return False
    return second.is_channelwise or (first.is_channelwise and not second.reads_zeros)


def _can_fold_window(first: AffineOperator, second: AffineOperator) -> bool:
    """Return whether padding or cropping can be folded into a convolution before or after it.

    A convolution before it then computes no positions that are cut off. One after it pads its input itself.
    """
    window, other = (first, second) if isinstance(first, Window) else (second, first)
    if isinstance(other, Selection) or other.is_average or other.is_channelwise or other.bias.ndim > 1:
        return False
    if any(axis.upsampling > 1 for axis in other.axes):
        return False
    if window is second:
        return not second.reads_zeros
    if any(axis.stride > 1 for axis in window.axes) and not all(size == 1 for size in second.kernel):
        return False  # it would become a dilated convolution
    return not second.reads_zeros or not any(axis.before < 0 or axis.after < 0 for axis in window.axes)


def move_pools_forward(chain: Chain) -> Chain:
    """Move each average pooling without padding in front of the pointwise operators that come directly before it.

    The function stays the same, because an affine map of a mean equals the mean of the mapped values. The pointwise operators
    then run on fewer positions.
    """
    moved: list[Element] = []
    for element in chain:
        position = len(moved)
        if isinstance(element, AffineOperator) and element.is_average and not _is_padded(element):
            while position and (pointwise := _as_pointwise(moved[position - 1])):
                element, position = _with_channels(element, pointwise.in_channels), position - 1
        moved.insert(position, element)
    return tuple(moved)


def move_upsampling_back(chain: Chain) -> Chain:
    """Move each nearest upsampling behind the pointwise operators that come directly after it.

    The function stays the same. The pointwise operators then run on fewer positions.
    """
    moved: list[Element] = []
    for element in chain:
        position = len(moved)
        pointwise = _as_pointwise(element)
        while position and pointwise and isinstance(repeat := moved[position - 1], Selection) and repeat.repeats:
            factors, device = repeat.upsampling, pointwise.weight.device
            moved[position - 1] = repeated_positions(pointwise.out_channels, factors, device)
            position -= 1
        moved.insert(position, element)
    return tuple(moved)


def _is_padded(operator: AffineOperator) -> bool:
    """Return whether an operator pads or crops its input."""
    return any(axis.before or axis.after for axis in operator.axes)


def _as_pointwise(element: Element) -> AffineOperator | None:
    """Return the element if it is a pointwise operator whose bias is the same at all positions, and None otherwise."""
    return element if isinstance(element, AffineOperator) and element.is_pointwise and element.has_uniform_bias else None


def _with_channels(pool: AffineOperator, channels: int) -> AffineOperator:
    """Return the same pooling for another number of channels."""
    weight = pool.weight[:1].expand(channels, *pool.weight.shape[1:]).contiguous()
    return replace(pool, weight=weight, bias=pool.bias.new_zeros(channels), groups=channels)


def split_residual(chain: Chain) -> tuple[Chain, bool]:
    """Return the branch of a residual block, or any other chain as it is, and whether the chain was a residual block.

    A residual block is a chain that only adds one branch to its input.
    """
    if len(chain) == 1 and isinstance(chain[0], Sum):
        branches = [branch for branch in chain[0].branches if branch]
        if len(branches) == 1 and len(chain[0].branches) == 2:
            return branches[0], True
    return chain, False


def fuse_pairs(chain: Chain) -> Chain:
    """Replace two neighbouring operators by a `FusedPair` wherever `fastentropy_kernels` has a kernel that computes both.

    If a residual block adds nothing but such a pair to its input, the kernel adds the input too.
    """
    paired: list[Element] = []
    for element in chain:
        previous = paired[-1] if paired else None
        if isinstance(previous, AffineOperator) and (pair := _fused_pair(previous, element)):
            paired[-1] = pair
        else:
            paired.append(_fuse_in_branches(element) if isinstance(element, Parallel) else element)
    return tuple(paired)


def _fuse_in_branches(element: Sum | Concatenation) -> Element:
    """Apply `fuse_pairs` to branches. A residual block of a single pair becomes that pair with its input added."""
    branches = tuple(fuse_pairs(branch) for branch in element.branches)
    joined = replace(element, branches=branches)
    body, adds_input = split_residual((joined,))
    if adds_input and len(body) == 1 and isinstance(body[0], FusedPair):
        return replace(body[0], adds_input=True)
    return element if branches == element.branches else joined


def _fused_pair(first: AffineOperator, second: Element) -> FusedPair | None:
    """Return two neighbouring operators as a `FusedPair`, or None if `fastentropy_kernels` has no kernel for the two."""
    if isinstance(first, Selection) or isinstance(second, Selection):
        return None
    if not isinstance(second, AffineOperator) or not (first.has_uniform_bias and second.has_uniform_bias):
        return None
    if not first.axes:
        return FusedPair("linear_pair", first, second) if first.out_channels <= MOST_MIDDLES else None
    symmetric = all(axis.upsampling == 1 and axis.before == axis.after >= 0 for axis in first.axes)
    dense_or_depthwise = first.groups == 1 or first.groups == first.in_channels == first.out_channels
    pointwise = second.is_pointwise and second.groups == 1
    if len(first.axes) == 2 and symmetric and dense_or_depthwise and pointwise:
        return FusedPair("conv_pointwise", first, second)
    return None


def rounded(chain: Chain, dtype: torch.dtype, share: Callable[[Tensor], Tensor] = lambda weight: weight) -> Chain:
    """Round the weights of a chain to the dtype in which it is to run, because they take much memory in float64.

    Depthwise operators and selections keep theirs, which are small, and from which the way in which they run is read.

    Args:
        chain: the chain.
        dtype: the dtype.
        share: returns what the result holds in place of a rounded weight, such as an equal tensor that exists already.
    """

    def of(operator: AffineOperator) -> AffineOperator:
        if isinstance(operator, Selection) or operator.groups == operator.in_channels == operator.out_channels:
            return operator
        return replace(operator, weight=share(operator.weight.to(dtype)))

    def rounded_element(element: Element) -> Element:
        match element:
            case Parallel(branches):
                return replace(element, branches=tuple(rounded(branch, dtype, share) for branch in branches))
            case BorderCorrected(interior, inner):
                return replace(element, interior=of(interior), chain=rounded(inner, dtype, share))
            case TapBiased(operator):
                return replace(element, operator=of(operator))
            case FusedPair(_, first, second):
                return replace(element, first=of(first), second=of(second))
            case Flatten() | Activation():
                return element
            case operator:
                return of(operator)

    return tuple(map(rounded_element, chain))
