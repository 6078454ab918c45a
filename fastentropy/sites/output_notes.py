"""Derive what is known of an operator's output from what is known of its inputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastentropy.sites.axes import (
    CHANNEL,
    OTHER,
    Axes,
    Factor,
    Note,
    channel_axis_of,
    joined_notes,
    moved,
    overlaid,
    reshaped,
    token_sets,
    unlabelled,
    unsqueezed,
    with_channel,
    with_squeezed_channel,
)
from fastentropy.sites.axis_moves import Shape, where_axes_go
from fastentropy.sites.operator_kinds import (
    ATTENTIONS,
    CHANNEL_NORMS,
    COLLECTIVES,
    CONVOLUTIONS,
    LAST,
    LAST_NORMS,
    LIKE,
    PRODUCTS,
    Call,
)
from fastentropy.sites.sharding import Sharding, is_dtensor, joined


class Input(NamedTuple):
    """A tensor that an operator reads."""

    x: Tensor
    shape: Shape  # before the operator ran, which may change it; () if the tensor cannot be followed
    note: Note | None
    is_weight: bool
    sharding: Sharding | None
    is_opaque: bool  # whether the tensor is of a kind that cannot be followed


def output_note(call: Call, inputs: Sequence[Input], new_shape: Shape) -> Note | None:
    """Return the note about an output of an operator; None if nothing is known of it.

    Args:
        call: the operator with its arguments.
        inputs: its tensors.
        new_shape: the shape of the output.
    """
    operator = call.operator
    if operator.is_reshape and inputs:
        source = inputs[0]
        if source.note is None and source.is_weight:
            return None
        return reshaped(source.note or Note(unlabelled(source.shape)), new_shape)
    known = [given for given in inputs if given.note is not None]
    if operator.name == "unsqueeze":
        return unsqueezed(known[0].note, call.args[1] % len(new_shape)) if known and known[0].note else None
    if operator.name in PRODUCTS:
        return _product_note(call, inputs, new_shape)
    notes = _moved_notes(call, known, new_shape)
    if operator.name in ATTENTIONS:
        return overlaid(notes) if notes else None
    note = joined_notes(notes) if notes else None
    if operator.name in CONVOLUTIONS or operator.name in CHANNEL_NORMS:
        return _with_channels_first(call, note or Note(unlabelled(new_shape)), new_shape)
    if not operator.is_followed or operator.name in LIKE:
        note = _without_tokens(known, note, new_shape, is_lost=operator.name not in LIKE)
    if operator.name in LAST and new_shape:
        axis: int | None = len(new_shape) - 1
    elif note is None or channel_axis_of(note.axes) is None:
        axis = _evident_channel_axis(call, inputs, new_shape)
    else:
        axis = None
    if axis is None:
        return note
    axes = unlabelled(new_shape) if note is None else note.axes
    return Note(with_channel(axes, axis, new_shape[axis]), note.lost if note else frozenset())


def _moved_notes(call: Call, known: Sequence[Input], new_shape: Shape) -> list[Note]:
    """Return what each input tells about an output."""
    notes = []
    for x, shape, note, *_ in reversed(known) if call.operator.is_copy else known:
        if note is None:
            continue
        if call.operator.is_pointwise and shape == new_shape:
            notes.append(note)
            continue
        where = where_axes_go(call, x, shape, new_shape)
        if where is not None:
            notes.append(moved(note, where, shape, new_shape))
    return notes


def _with_channels_first(call: Call, note: Note, new_shape: Shape) -> Note | None:
    """Return the note with axis 1 as the channel axis.

    An instance norm runs as a batch norm whose axis 1 holds the batch and the channels. There the channels are the last part.
    """
    if len(new_shape) < 2:
        return None
    axis = note.axes[1]
    if call.operator.name in CHANNEL_NORMS and len(new_shape) > 2 and new_shape[0] == 1 and len(axis) > 1:
        if not any(factor.label == CHANNEL for factor in axis):
            axis = (*axis[:-1], Factor(CHANNEL, axis[-1].size))
        return Note((note.axes[0], axis, *note.axes[2:]), note.lost)
    return Note(with_channel(note.axes, 1, new_shape[1]), note.lost)


def _without_tokens(known: Sequence[Input], note: Note | None, new_shape: Shape, is_lost: bool) -> Note | None:
    """Return the note about an output in which the tokens of the inputs are not at their places.

    Args:
        known: the inputs with notes.
        note: the note, which may have the tokens at their places.
        new_shape: the shape of the output.
        is_lost: whether the output comes from tokens.
    """
    sets = frozenset[int]()
    if is_lost:
        sets = sets.union(*(given.note.lost | token_sets_of(given.note.axes) for given in known if given.note is not None))
    if note is None:
        return Note(unlabelled(new_shape), sets) if sets else None
    axes = tuple([tuple([f if f.label == CHANNEL else Factor(OTHER, f.size) for f in axis]) for axis in note.axes])
    return Note(axes, sets)


def token_sets_of(axes: Axes) -> frozenset[int]:
    """Return the numbers of the sets of token sequences whose positions the axes hold."""
    return token_sets(factor for axis in axes for factor in axis)


def sets_of(note: Note | None) -> frozenset[int]:
    """Return the numbers of the sets of token sequences that the values of a tensor come from."""
    return frozenset() if note is None else note.lost | token_sets_of(note.axes)


def _evident_channel_axis(call: Call, inputs: Sequence[Input], new_shape: Shape) -> int | None:
    """Return the channel axis that the weights of an operator tell, for inputs of unknown origin."""
    last = len(new_shape) - 1
    if last >= 0 and call.operator.name in LAST_NORMS:
        return last
    weights = [given for given in inputs if given.is_weight and not given.is_opaque]
    if last < 1 or len(weights) == len(inputs):
        return None
    for weight in weights:
        shape = weight.shape
        if len(shape) == 1 and shape[0] == new_shape[-1]:
            return last
        if call.operator.is_pointwise and len(shape) <= len(new_shape):
            long = [axis + len(new_shape) - len(shape) for axis, size in enumerate(shape) if size != 1]
            if len(long) == 1 and (long[0] == last or (long[0] == 1 and last > 2)) and new_shape[long[0]] == max(shape):
                return long[0]
        is_lookup = call.operator.name in ("index", "index_select") and weight.x is call.args[0] and len(shape) > 1
        if is_lookup and shape[-1] == new_shape[-1]:
            return last
    return None


def _product_note(call: Call, inputs: Sequence[Input], new_shape: Shape) -> Note | None:
    """Return the note about a matrix product."""
    left, right = (next((given for given in inputs if given.x is factor), _NOTHING) for factor in call.factors())
    notes = _moved_notes(call, [given for given in (left, right) if given.note is not None], new_shape)
    note = overlaid(notes) if notes else Note(unlabelled(new_shape))
    is_vector, last = call.operator.name in ("mv", "addmv"), len(new_shape) - 1
    axis: int | None = None
    if left.is_weight or right.is_weight:
        weight_first = call.operator.name != "linear" and left.is_weight and not right.is_weight
        axis = last if not weight_first or is_vector else last - 1
        is_single = is_vector and not weight_first
    else:
        note = Note(note.axes, note.lost | _mixed(left, right, -1) | _mixed(right, left, _rows(call, right)))
        is_single = is_vector
        if channel_axis_of(note.axes) is None:
            axis = _constant_factor_axis(call, left, right, new_shape)
            if axis is None and not is_vector:
                axis = _evident_channel_axis(call, inputs, new_shape)  # the weight is a bias
    if axis is None or last < 0:
        return note if notes or note.lost else None
    if is_single:
        return Note(with_squeezed_channel(note.axes), note.lost)
    return Note(with_channel(note.axes, axis, new_shape[axis]), note.lost)


#: Stands for an argument that is no tensor, such as packed weights.
_NOTHING: Any = Input(None, (), None, False, None, True)  # type: ignore[arg-type]


def _rows(call: Call, right: Input) -> int:
    """Return the axis of a product's right factor that is summed over."""
    return -1 if call.operator.name == "linear" or len(right.shape) == 1 else -2


def _constant_factor_axis(call: Call, left: Input, right: Input, new_shape: Shape) -> int | None:
    """Return the axis of the new channels, if a product sums over the channels of one factor and the other is a constant."""
    last = len(new_shape) - 1
    rows = _rows(call, right)
    if left.note is not None and _is_constant(right) and channel_axis_of(left.note.axes) == len(left.shape) - 1:
        return last
    if right.note is not None and _is_constant(left) and channel_axis_of(right.note.axes) == len(right.shape) + rows:
        return last - 1 if rows == -2 else None
    return None


def _is_constant(factor: Input) -> bool:
    """Return whether nothing is known of a factor, so that it may be a constant."""
    return factor.note is None or not (factor.note.lost or any(f.label != OTHER for axis in factor.note.axes for f in axis))


def _mixed(factor: Input, other: Input, summed: int) -> frozenset[int]:
    """Return the sets of token sequences whose tokens a product mixes in an unknown way.

    If it sums over the tokens of a factor with an unknown square matrix, the output may have them at the same places. Otherwise
    its entries are no tokens.
    """
    if factor.note is None or not _is_constant(other) or not factor.shape:
        return frozenset()
    may_keep = other.is_opaque or (len(other.shape) > 1 and other.shape[-1] == other.shape[-2])
    return token_sets(factor.note.axes[summed]) if may_keep else frozenset()


def output_sharding(call: Call, inputs: Sequence[Input], y: Tensor) -> Sharding | None:
    """Return how an operator's output is divided among ranks; None if no input is a tensor that comes from a DTensor.

    Args:
        call: the operator with its arguments.
        inputs: its tensors.
        y: the output.
    """
    divided = [(given.x, given.shape, given.sharding) for given in inputs if given.sharding is not None]
    if not divided or is_dtensor(y):
        return None
    operator = call.operator
    if operator.name in COLLECTIVES:
        return divided[0][2].reduced()
    if operator.is_reshape:
        _, shape, sharding = divided[0]
        return sharding.reshaped(shape, y.shape)
    moves = []
    for x, shape, sharding in divided:
        if operator.name in CONVOLUTIONS:
            where: Sequence[int | None] | None = _convolved_where(call, x, shape)
        else:
            where = where_axes_go(call, x, shape, y.shape)
        if where is not None:
            targets = {axis: new if new is None or new >= 0 else ~new for axis, new in enumerate(where)}
            moves.append(sharding.moved(targets.get, y.shape))
    return joined(moves)


def _convolved_where(call: Call, x: Tensor, shape: Shape) -> Sequence[int | None] | None:
    """Return where the divided axes of a convolution's inputs go: those of the images, and of the filters."""
    kept = {0: 0} if x is call.args[0] else {0: 1} if x is call.args[1] else None
    return None if kept is None else [kept.get(axis) for axis in range(len(shape))]
