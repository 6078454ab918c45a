"""Find out which positions of a batch of token sequences are padding, from the arguments of a model's call."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Where the padding mask comes from. This is the name of the argument of a forward that holds the mask, or a function that
#: returns the mask for the (args, kwargs) of the outermost call, or None for no mask.
Mask = str | Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor | None] | None


class TokenAxes(NamedTuple):
    """The axes of a tensor along which the positions of a batch of token sequences lie."""

    batch: int  # the axis of the sequences
    tokens: int  # the axis of the tokens; equal to `batch` if both are one axis, on which the tokens of a sequence are adjacent


#: The token axes of a tensor whose values come from tokens, but could not be followed: its shape decides.
BY_SHAPE = TokenAxes(-1, -1)


class MaskArgument(NamedTuple):
    """The parameter of a module's forward that takes the padding mask."""

    name: str
    place: int | None  # its index among the positional arguments; None if it can be given by name only

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """Return whether a call gives this argument, and its value (None if it is not given).

        Args:
            args: the positional arguments of the call.
            kwargs: its keyword arguments.
        """
        if self.name in kwargs:
            return True, kwargs[self.name]
        if self.place is not None and len(args) > self.place:
            return True, args[self.place]
        return False, None


def mask_argument(module: nn.Module, name: str) -> MaskArgument | None:
    """Return the argument with the given name of a module's forward, or None if the forward takes no such argument."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward without a signature, written in C
        return None
    if name not in parameters:
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return MaskArgument(name, None) if takes_any else None
    positional = [key for key, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    return MaskArgument(name, positional.index(name) if name in positional else None)


def token_mask(mask: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return which positions of a call's token sequences are tokens and not padding.

    Args:
        mask: the padding mask of the call: a tensor [batch, tokens] that is not 0 at tokens. If it also covers a key-value
            cache, it is longer than the sequences of this call. Then its last positions apply.
        args: the positional arguments of the call, from which the length of the sequences is read.
        kwargs: its keyword arguments.

    Returns:
        bool [batch, tokens], or None if all positions are to be counted. On the CPU it is None if all positions are tokens. It
            is also None if `mask` is no padding mask. A mask with more axes, one that is added to attention scores, and a
            square one that is the same along every diagonal (such as a causal mask of more than 2 tokens) tell which token
            attends to which. A mask that does not have the shape of the call's sequences tells nothing about them.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    candidates = _candidates(mask, args, kwargs)
    tokens = _best(mask, candidates)
    if tokens is None and candidates:
        return None
    length = mask.shape[1] if tokens is None else tokens.shape[1]
    is_token = mask[:, mask.shape[1] - length :] != 0
    if mask.shape[0] == mask.shape[1] == length > 2:  # no `if` on values, which would wait for a GPU
        is_token = is_token | (is_token[1:, 1:] == is_token[:-1, :-1]).all()
    return None if is_token.device.type == "cpu" and bool(is_token.all()) else is_token


def tells_of_padding(mask: Tensor) -> bool:
    """Return whether a mask is 0 somewhere, so that somebody expects positions to be left out. Only asked on the CPU."""
    return mask.device.type == "cpu" and not bool((mask != 0).all())


def same_shape(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two masks have the same shape, or there is neither."""
    return first is second is None or (first is not None and second is not None and first.shape == second.shape)


def find_tokens(mask: Tensor | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor of a call whose positions a padding mask is about, or None if there is none.

    Integers are preferred to floating-point tensors, and tensors of the mask's length to shorter ones.

    Args:
        mask: the padding mask of the call, or None if the call has none.
        args: the positional arguments of the call.
        kwargs: its keyword arguments.

    Returns:
        Token ids [batch, tokens], or embeddings [batch, tokens, features]. Embeddings [tokens, batch, features] and [batch,
            features, tokens] are transposed if the mask tells them apart.
    """
    if mask is not None and mask.ndim != 2:
        mask = None
    candidates = _candidates(mask, args, kwargs)
    return _best(mask, candidates) if mask is not None else next(iter(candidates), None)


def positions_to_count(
    is_token: Tensor | None, x: Tensor, channel_axis: int | None, token_axes: TokenAxes | None = BY_SHAPE
) -> Tensor | None:
    """Return the mask for the kernels: True at the positions of `x` that are counted.

    Args:
        is_token: bool [batch, tokens], False at padding; or None.
        x: the input of an activation.
        channel_axis: the axis of the neurons in `x`. None if all values belong to one neuron.
        token_axes: where the positions of `is_token` lie in `x`. None if `x` has none of them. If they are to be found by the
            shape of `x`, they are if it is [batch, tokens, neurons] or [batch * tokens, neurons].

    Returns:
        bool, with the shape of `x` without its channel axis (if it has one), on the device of `x`. None if there is no mask, or
            if it does not fit `x`.
    """
    shape = list(x.shape)
    token_axes = None if is_token is None else axes_of_mask(is_token.shape, shape, channel_axis, token_axes)
    if is_token is None or token_axes is None:
        return None
    batch, tokens = token_axes
    positions = is_token.to(x.device)
    if batch == tokens:
        positions = positions.flatten()
    elif batch > tokens:
        positions = positions.t()
    kept = [axis for axis in range(len(shape)) if axis != channel_axis]
    if len(kept) == positions.ndim:
        return positions
    alone = [shape[axis] if axis in token_axes else 1 for axis in kept]
    return positions.reshape(alone).expand([shape[axis] for axis in kept]).contiguous()


def axes_of_mask(
    mask_shape: Sequence[int], shape: Sequence[int], channel_axis: int | None, token_axes: TokenAxes | None
) -> TokenAxes | None:
    """Return the axes of an input along which the positions of a mask lie; None if the mask does not fit.

    Args:
        mask_shape: the shape of the mask, [batch, tokens].
        shape: the shape of the input.
        channel_axis: as for `positions_to_count`.
        token_axes: as for `positions_to_count`.
    """
    if token_axes == BY_SHAPE:
        token_axes = _axes_by_shape(mask_shape, shape, channel_axis)
    if token_axes is None or max(token_axes) >= len(shape) or channel_axis in token_axes:
        return None
    batch, tokens = token_axes
    if batch == tokens:
        return token_axes if shape[batch] == prod(mask_shape) else None
    return token_axes if [shape[batch], shape[tokens]] == list(mask_shape) else None


def _axes_by_shape(mask_shape: Sequence[int], shape: Sequence[int], channel_axis: int | None) -> TokenAxes | None:
    """Return the axes of a tensor whose sizes are those of a mask; None if there are none. The neurons are behind them."""
    positions = list(shape) if channel_axis is None else list(shape[:-1])
    if channel_axis not in (None, len(shape) - 1):
        return None
    if positions == list(mask_shape):
        return TokenAxes(0, 1)
    return TokenAxes(0, 0) if positions == [prod(mask_shape)] else None


#: Arguments with such names hold something about the tokens, not the tokens themselves.
_BESIDE = re.compile("position|type|label|mask|segment|decoder|length")


def _candidates(mask: Tensor | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments of a call that may be tokens, the most likely first."""
    named = sorted(kwargs.items(), key=lambda item: bool(_BESIDE.search(item[0])))
    given = [*args, *(value for _, value in named)]
    tensors = [value for value in given if isinstance(value, Tensor) and value is not mask] or list(_nested_tensors(given))
    found: list[list[Tensor]] = [[], [], [], []]
    for x in tensors:
        if x is mask or x.dtype == torch.bool or x.layout is not torch.strided or x.is_nested:
            continue
        if x.is_floating_point():
            if x.ndim == 3:
                found[1].append(x)
            elif mask is not None and x.shape == mask.shape:
                found[3].append(x)
        elif x.ndim in (2, 3):
            found[0 if x.ndim == 2 else 2].append(x)
    return [x for group in found for x in group]


def _best(mask: Tensor, candidates: Sequence[Tensor]) -> Tensor | None:
    """Return the first of the candidates that fits a mask best; None if none fits."""
    batch, length = mask.shape
    same = [x for x in candidates if x.shape[0] == batch]
    for x in same:
        if x.shape[1] == length:
            return x
    shorter = [x for x in same if x.shape[1] < length]
    if shorter and not shorter[0].is_floating_point():
        return shorter[0]
    for x in candidates:  # channels first, or tokens first
        if x.ndim == 3 and (x.shape[0], x.shape[2]) == (batch, length):
            return x.transpose(1, 2)
        if x.ndim == 3 and (x.shape[1], x.shape[0]) == (batch, length):
            return x.transpose(0, 1)
    return shorter[0] if shorter else None


def _nested_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Return the tensors in nested lists, tuples and mappings."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _nested_tensors(value)
        elif isinstance(value, Mapping):
            yield from _nested_tensors(value.values())
