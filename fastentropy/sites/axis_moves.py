"""Say where the axes of an operator's input go in its output."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastentropy.sites.axes import Where
from fastentropy.sites.operator_kinds import (
    ALIGNED,
    ALONG,
    ATTENTIONS,
    CHANNEL_NORMS,
    CONVOLUTIONS,
    LAST,
    LAST_NORMS,
    LIKE,
    PRODUCTS,
    REDUCTIONS,
    Call,
)

Shape = Sequence[int]


def where_axes_go(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Return where the axes of an input go in the output; None if nothing can be said.

    Args:
        call: the operator with its arguments.
        x: the input.
        shape: its shape before the operator ran, which may have changed it.
        new_shape: the shape of the output.
    """
    rule = _RULES.get(call.operator.name)
    if rule is None:
        rule = _where_aligned if call.operator.is_pointwise else _where_default
    return rule(call, x, shape, new_shape)


def _where_aligned(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Align the last axes, as elementwise operators do."""
    offset = len(new_shape) - len(shape)
    return range(offset, len(new_shape)) if offset >= 0 else None


def _where_default(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Remove the axes that an unknown operator is told to reduce; otherwise keep the axes if there are as many."""
    if len(new_shape) < len(shape):
        dim = call.argument("dim")
        return None if dim is None else _removed(len(shape), dim)
    if len(new_shape) > len(shape):
        return None
    return [axis if size == new else None for axis, (size, new) in enumerate(zip(shape, new_shape, strict=True))]


def _removed(ndim: int, dims: int | Sequence[int]) -> Where:
    """Return where axes go when the axes `dims` are removed; all are removed if `dims` is empty."""
    gone = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)} or set(range(ndim))
    return [None if axis in gone else axis - sum(dim < axis for dim in gone) for axis in range(ndim)]


def _where_reduced(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Remove the axes of a reduction, or keep them with size 1."""
    if len(new_shape) == len(shape):
        return _where_aligned(call, x, shape, new_shape) if call.operator.is_pointwise else range(len(shape))
    dim = call.argument("dim")
    return _where_aligned(call, x, shape, new_shape) if dim is None else _removed(len(shape), dim)


def _where_along(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Mark the axes along which entries are moved as changed."""
    if len(shape) != len(new_shape):
        return None
    dims = next((dims for name in ("dim", "dims") if (dims := call.argument(name)) is not None), None)
    dims = [dims] if isinstance(dims, int) else dims or range(len(shape))
    changed = {dim % len(shape) for dim in dims}
    return [~axis if axis in changed else axis for axis in range(len(shape))]


def _where_permuted(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Follow a permutation."""
    order = [dim % len(shape) for dim in call.args[1]]
    return [order.index(axis) for axis in range(len(shape))]


def _where_transposed(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Exchange two axes."""
    ndim = len(shape)
    first, second = (dim % ndim for dim in call.args[1:3]) if len(call.args) > 2 else (0, ndim - 1)
    where = list(range(ndim))
    where[first], where[second] = second, first
    return where


def _where_removed(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Remove an axis, of which one entry is left."""
    return _removed(len(shape), call.argument("dim"))


def _where_squeezed(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Remove axes of size 1."""
    dims = call.args[1] if len(call.args) > 1 else range(len(shape))
    gone = [dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims) if len(shape) and shape[dim] == 1]
    return _removed(len(shape), gone) if gone else range(len(shape))


def _where_stacked(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Insert an axis."""
    inserted = (call.argument("dim") or 0) % len(new_shape)
    return [axis + int(axis >= inserted) for axis in range(len(shape))]


def _where_first_axes(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Keep the axes of an input to which the output adds axes, or from which it takes axes, at the end."""
    return [axis if axis < len(new_shape) else None for axis in range(len(shape))]


def _where_factor(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Keep the axes of a matrix product's factor that are not summed over."""
    left, right = call.factors()
    ndim, last = len(shape), len(new_shape) - 1
    if x is left:
        return [*range(ndim - 1), None]
    if x is not right or call.operator.name in ("mv", "addmv"):
        return None
    if call.operator.name == "linear":
        return [last, None]
    return [*range(last + 1 - ndim, last - 1), None, last] if ndim > 1 else [None]


def _where_convolved(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Keep the batch and the spatial axes of a convolution's input."""
    return [axis if axis != 1 else None for axis in range(len(shape))] if x is call.args[0] else None


def _where_attended(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Keep the axes of the queries, and the last axis of the values."""
    query, _, value = call.args[:3]
    if x is not query and x is not value:
        return None
    where: list[int | None] = list(range(len(shape)))
    if x is not query:
        where[-2] = None
    if x is not value:
        where[-1] = None
    return where


def _where_last_made(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Keep all axes but the last, which is a new one; of an embedding, those of the indices."""
    if call.operator.name == "embedding":
        return range(len(shape)) if x is call.args[1] else None
    is_first = bool(call.args) and x is call.args[0] and len(shape) == len(new_shape)
    return [*range(len(shape) - 1), None] if is_first else None


def _where_indexed(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Follow advanced indexing: the axes of the indices take the place of the axes that they index."""
    indices = list(call.args[1])
    spans = [index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1 for index in indices]
    given = [(index, span) for index, span in zip(indices, spans, strict=True) if index is not None]
    ndims = [1 if index.dtype in (torch.bool, torch.uint8) else index.ndim for index, _ in given]
    width = max(ndims, default=0)
    begin = next((i for i, index in enumerate(indices) if index is not None), 0)
    adjacent = all(index is not None for index in indices[begin : begin + len(given)])
    first = begin if adjacent else 0
    if x is not call.args[0]:
        ndim = next((n for (index, _), n in zip(given, ndims, strict=True) if index is x), None)
        is_bool = x.dtype in (torch.bool, torch.uint8)
        return None if ndim is None or is_bool else [first + width - ndim + axis for axis in range(ndim)]
    where: list[int | None] = []
    kept = 0
    for index, span in zip(indices, spans, strict=True):
        if index is not None:
            is_chosen = len(given) == 1 and width == 1 and span == 1
            where += [~first] if is_chosen else [None] * span
        else:
            where.append(kept + (width if kept >= first else 0))
            kept += 1
    for _ in range(len(shape) - len(where)):
        where.append(kept + (width if kept >= first else 0))
        kept += 1
    return where


def _where_windowed(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Cut an axis into windows, of which the entries become the last axis."""
    dim = call.args[1] % max(len(shape), 1)
    return [~axis if axis == dim else axis for axis in range(len(shape))]


def _where_shuffled(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Exchange channels, or entries of the channels and of the two spatial axes after them."""
    ndim = len(shape)
    changed = [1] if "channel" in call.operator.name else [ndim - 3, ndim - 2, ndim - 1]
    return [~axis if axis in changed else axis for axis in range(ndim)]


def _where_unfolded(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Put the patches of an image into columns, or back: the channels become longer or shorter."""
    channel = min(len(shape), len(new_shape)) - 2
    return [~channel if axis == channel else axis if axis < channel else None for axis in range(len(shape))]


def _where_sampled(call: Call, x: Tensor, shape: Shape, new_shape: Shape) -> Where | None:
    """Take patches or single points of images: the channels stay axis 1."""
    if x is not call.args[0]:
        return None
    is_grid = call.operator.name.startswith("grid_sampler")
    return [0 if is_grid else None, 1, *[~axis for axis in range(2, len(shape))]]


_Rule = Callable[[Call, Tensor, Shape, Shape], Where | None]
_RULES: dict[str, _Rule] = {
    name: rule
    for names, rule in (
        (ALIGNED | LIKE | LAST_NORMS | CHANNEL_NORMS, _where_aligned),
        (ALONG, _where_along),
        (REDUCTIONS, _where_reduced),
        (CONVOLUTIONS, _where_convolved),
        (PRODUCTS, _where_factor),
        (ATTENTIONS, _where_attended),
        (LAST, _where_last_made),
        (("transpose", "t"), _where_transposed),
        (("permute",), _where_permuted),
        (("select", "unbind"), _where_removed),
        (("squeeze",), _where_squeezed),
        (("unsqueeze", "stack"), _where_stacked),
        (("index",), _where_indexed),
        (("unfold",), _where_windowed),
        (("view_as_real", "view_as_complex"), _where_first_axes),
        (("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler", "roi_align", "roi_pool"), _where_sampled),
        (("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"), _where_shuffled),
        (("im2col", "col2im"), _where_unfolded),
    )
    for name in names
}
