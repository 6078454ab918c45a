"""Know what the outputs of some modules hold without following the operators of each call.

This is for models that call a module thousands of times in a pass, since following an operator takes tens of microseconds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastentropy._compat import in_function_mode, is_functorch_tensor, is_replica, parameters_of, runs_only_forward
from fastentropy.sites.axes import Note

#: Layers that read one tensor and write into none, with the forwards that they have.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm)
}


class LayerCall(NamedTuple):
    """All that decides what the output of a layer holds."""

    note: Note | None  # about the input
    shape: torch.Size  # of the input
    strides: Sequence[int]
    dtype: torch.dtype
    records_gradients: bool
    is_inference: bool


class LayerOutput(NamedTuple):
    """What the output of a layer was in a call whose operators were followed."""

    call: LayerCall
    shape: torch.Size
    note: Note | None


def layer_input(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a layer reads, if its call does nothing but what layers of its class do; otherwise None.

    It may do something else if there are hooks or modes, if the forward was replaced, if the weights are not plain, or if
    autocast makes copies of them that other calls share.
    """
    forward = _FORWARDS.get(type(module))
    if forward is None or kwargs or len(args) != 1:
        return None
    x, kind = args[0], type(module)
    if type(x) is not Tensor or is_functorch_tensor(x) or is_replica(module):
        return None
    if kind.forward is not forward or "forward" in vars(module) or not runs_only_forward(module):
        return None
    for weight in parameters_of(module).values():
        if weight is not None and type(weight) is not nn.Parameter:
            return None
    return None if in_function_mode() or torch.is_autocast_enabled(x.device.type) else x


def layer_call(x: Tensor, note: Note | None) -> LayerCall:
    """Return all that decides what the output of a layer holds, for an input and the note about it."""
    records = torch.is_grad_enabled()
    return LayerCall(note, x.shape, x.stride(), x.dtype, records, torch.is_inference_mode_enabled())
