"""Which positions of a batch of token sequences are tokens, and which are padding: from the arguments of a model's call."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: The name of the mask among the arguments of a forward, or a function of (args, kwargs) of the outermost call, or no mask.
Mask = str | Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor | None] | None


class MaskArgument(NamedTuple):
    """Where a forward takes the mask: by name, and in which place where it is given by position (None: by name only)."""

    name: str
    place: int | None

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """Whether a call gives the mask, and what it gives."""
        if self.name in kwargs:
            return True, kwargs[self.name]
        if self.place is not None and len(args) > self.place:
            return True, args[self.place]
        return False, None


def mask_argument(module: nn.Module, name: str) -> MaskArgument | None:
    """The argument of that name of a module's forward, or None where it has none."""
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
    """Which positions of a call's token sequences are tokens, not padding: bool [batch, tokens].

    mask is [batch, tokens], not 0 where there is a token. One that covers a key-value cache as well is longer than the tokens
    of this call, and its end counts. None where all are tokens, and where the mask is of another kind: with more axes, or one
    that is added to scores, it says who attends to whom.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    tokens = _sequence_length(mask, args, kwargs)
    if tokens > mask.shape[1]:
        return None
    is_token = mask[:, mask.shape[1] - tokens :] != 0
    return None if is_token.device.type == "cpu" and bool(is_token.all()) else is_token


def positions_to_count(is_token: Tensor | None, x: Tensor, channel_axis: int) -> Tensor | None:
    """The mask of x for the kernels: bool, the shape of x without its channel axis; None where x is not made of those tokens.

    Tokens are [batch, tokens, neurons], or [batch * tokens, neurons].
    """
    if is_token is None or channel_axis != x.ndim - 1:
        return None
    if x.ndim == 3 and x.shape[:2] == is_token.shape:
        return is_token.to(x.device)
    if x.ndim == 2 and x.shape[0] == is_token.numel():
        return is_token.to(x.device).flatten()
    return None


def _sequence_length(mask: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tokens each sequence of this call has: read from the first argument that holds tokens or their embeddings."""
    for value in _tensors(args, kwargs):
        is_tokens = value.ndim == 3 if value.is_floating_point() else value.ndim == 2
        if value is not mask and is_tokens and value.dtype != torch.bool and value.shape[0] == mask.shape[0]:
            return value.shape[1]
    return mask.shape[1]


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    return (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
