"""Find out which positions of a batch of token sequences are padding, from the arguments of a model's call."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
            is also None if `mask` is of another kind: a mask with more axes, or one that is added to attention scores, tells
            which token attends to which.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    tokens = _sequence_length(mask, args, kwargs)
    if tokens > mask.shape[1]:
        return None
    is_token = mask[:, mask.shape[1] - tokens :] != 0
    return None if is_token.device.type == "cpu" and bool(is_token.all()) else is_token


def find_tokens(mask: Tensor | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor of a call whose positions a padding mask is about, or None if there is none.

    Args:
        mask: the padding mask of the call, or None if the call has none.
        args: the positional arguments of the call.
        kwargs: its keyword arguments.

    Returns:
        Token ids [batch, tokens], or embeddings [batch, tokens, features].
    """
    for value in _tensors(args, kwargs):
        is_tokens = value.ndim == 3 if value.is_floating_point() else value.ndim == 2
        if value is not mask and is_tokens and (mask is None or value.shape[0] == mask.shape[0]):
            return value
    return None


def positions_to_count(
    is_token: Tensor | None, x: Tensor, channel_axis: int | None, token_axes: TokenAxes | None = BY_SHAPE
) -> Tensor | None:
    """Return the mask for the kernels: True at the positions of `x` that are counted.

    Args:
        is_token: bool [batch, tokens], False at padding; or None.
        x: the input of an activation, [batch, tokens, neurons] or [batch * tokens, neurons].
        channel_axis: the axis of the neurons in `x`. None if all values belong to one neuron.
        token_axes: where the positions of `is_token` lie in `x`. None if `x` has none of them.

    Returns:
        bool, with the shape of `x` without its channel axis (if it has one), on the device of `x`. None if there is no mask, or
            if it does not fit `x`.
    """
    if channel_axis is None:
        x, channel_axis = x.unsqueeze(-1), x.ndim
    if is_token is None or token_axes is None or channel_axis != x.ndim - 1:
        return None
    if x.ndim == 3 and x.shape[:2] == is_token.shape:
        return is_token.to(x.device)
    if x.ndim == 2 and x.shape[0] == is_token.numel():
        return is_token.to(x.device).flatten()
    return None


def _sequence_length(mask: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the length of the token sequences of a call.

    It is read from the first argument that looks like token ids [batch, tokens] or embeddings [batch, tokens, features]. If
    there is none, it is the length of the mask.
    """
    for value in _tensors(args, kwargs):
        is_tokens = value.ndim == 3 if value.is_floating_point() else value.ndim == 2
        if value is not mask and is_tokens and value.dtype != torch.bool and value.shape[0] == mask.shape[0]:
            return value.shape[1]
    return mask.shape[1]


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Return the tensors among the arguments of a call."""
    return (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
