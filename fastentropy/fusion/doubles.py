"""Run a model in float64 without a second copy of its weights, which would take twice the memory of the model."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastentropy._compat import tree_map
from fastentropy.fusion.chains.blocks import linear


class InDouble:
    """A model whose floating-point weights and buffers are in float64.

    Each is converted where it is read, and freed afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take over a model. Its weights are shared, and everything else is copied, since a call may change it."""
        self._weights = [value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()]
        self._model = copy.deepcopy(model, {id(value): value for value in self._weights})

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the model."""
        with _Converted(self._weights):
            return self._model(*inputs, **keywords)


class _Converted(TorchFunctionMode):
    """While the context is active, functions of PyTorch get some tensors in float64."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._ids = {id(tensor) for tensor in tensors}

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function with the converted tensors. The weight of a linear layer can be large, and is converted in blocks."""
        if func is F.linear and len(args) > 1 and id(args[1]) in self._ids and not kwargs:
            return linear(args[0], *args[1:])
        args, kwargs = tree_map(self._converted, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _converted(self, value: Any) -> Any:
        """Return a value in float64 if it is one of the tensors."""
        return value.double() if id(value) in self._ids else value
