"""Keep PyTorch's transformer layers from running as one kernel each, which hides their activations."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class _FastPaths:
    """Keep transformer layers from running as one kernel each, which hides their activations, while any thread is inside."""

    def __init__(self) -> None:
        """Begin with no thread inside."""
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Switch the fast paths off inside the block."""
        with self._lock:
            if not self._inside:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    torch.backends.mha.set_fastpath_enabled(self._before)


_FAST_PATHS = _FastPaths()


def without_fast_path(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same as the call of a transformer layer or encoder, but calls the activations.

    The fast path of an encoder drops padding and puts zeros in its place, before the last norm. The function does so too.
    """

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        padding = _dropped_padding(module, *args, **kwargs) if isinstance(module, nn.TransformerEncoder) else None
        with _FAST_PATHS.off():
            y = call(module, *args, **kwargs)
        if padding is None:
            return y
        zero = y.new_zeros(y.shape[-1])
        norm = getattr(module, "norm", None)
        return torch.where(padding[..., None], zero if norm is None else norm(zero), y)

    return run


def _dropped_padding(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor | None:
    """Return the padding mask of a call if the fast path of an encoder would drop the padding; otherwise None.

    The conditions are those of `nn.TransformerEncoder.forward`, of which the other arguments are.
    """
    layer = encoder.layers[0]
    if src_key_padding_mask is None or mask is not None or src.dim() != 3 or src.is_nested or layer.training:
        return None
    if not (torch.backends.mha.get_fastpath_enabled() and vars(encoder).get("use_nested_tensor")):
        return None
    learns = torch.is_grad_enabled() and (src.requires_grad or any(weight.requires_grad for weight in layer.parameters()))
    if learns or torch.is_autocast_enabled():
        return None
    padding = src_key_padding_mask if src_key_padding_mask.dtype == torch.bool else src_key_padding_mask != 0
    is_left_aligned = not bool((padding[:, :-1] & ~padding[:, 1:]).any())
    return padding if is_left_aligned or not getattr(encoder, "mask_check", True) else None


def fast_paths(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """List the attributes that let the transformer layers of a model run in one kernel each, which hides their activations.

    Args:
        model: any module. Only nn.TransformerEncoder and nn.TransformerEncoderLayer inside it have such attributes.

    Returns:
        (module, attribute, value) for each such attribute. With this value, the layers call their activations.
    """
    layers = [
        (module, "activation_relu_or_gelu", 0) for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)
    ]
    encoders = [(module, "use_nested_tensor", False) for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return [(module, name, value) for module, name, value in (*layers, *encoders) if vars(module).get(name)]


def replace_activation(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace an activation of a model by another module, which gets the training mode of the activation.

    Transformer layers with a kernel for the whole layer are set to call their activation, because the kernel would still
    compute the replaced one.

    Args:
        model: the model, which is changed.
        name: the dotted path of the activation module.
        module: the replacement.
    """
    model.set_submodule(name, module.train(model.get_submodule(name).training))
    for owner, attribute, value in fast_paths(model.get_submodule(name.rpartition(".")[0])):
        setattr(owner, attribute, value)
