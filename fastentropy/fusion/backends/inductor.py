"""Run a network compiled by torch.compile with frozen weights on a CPU, and as a CUDA graph on a GPU."""

import contextlib
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import tree_leaves, tree_map, with_frozen_weights, with_recompile_limit

#: How often a network may be compiled. Each memory format of the inputs takes two times, and twice as many in inference mode.
RECOMPILE_LIMIT = 64

#: Held while a network is compiled, because the options that are switched on meanwhile are those of all threads.
_COMPILING = threading.RLock()


class Compiled:
    """A network that is compiled in the first call, and again for inputs of other shapes, at most twice (see torch.compile).

    It is also compiled for each memory format of the inputs, and once more for inference mode. The weights of the first call
    are part of the compiled code: torch.compile folds batch norm into them and lays them out for the machine. A call that needs
    gradients runs the network as it is, and so does one that torch.compile or torch.export traces.
    """

    def __init__(self, network: nn.Module) -> None:
        """Prepare the compilation of a network."""
        self._network = network
        on_gpu = any(value.is_cuda for value in network.state_dict().values())
        # A CUDA graph writes its outputs into the memory of those of the call before, so they are copied.
        self._copies_outputs = on_gpu
        self._compiled = torch.compile(network, fullgraph=True, mode="reduce-overhead" if on_gpu else None)
        self._shapes: set[tuple[Any, ...]] = set()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the network."""
        leaves = [leaf for leaf in tree_leaves((inputs, keywords)) if isinstance(leaf, Tensor)]
        needs_gradients = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
        if needs_gradients or torch.compiler.is_compiling():
            return self._network(*inputs, **keywords)
        # What torch.compile compiles again for.
        shapes = (torch.is_inference_mode_enabled(), *[(leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves])
        with torch.no_grad():
            if shapes in self._shapes:
                outputs = self._compiled(*inputs, **keywords)
            else:
                # Weights are frozen only if this is switched on while the call compiles. As an option of torch.compile it has
                # no effect, because the weights have become inputs by then.
                with _COMPILING, freezing(self._network.state_dict().values()), with_recompile_limit(RECOMPILE_LIMIT):
                    outputs = self._compiled(*inputs, **keywords)
                self._shapes.add(shapes)
        return tree_map(_copied, outputs) if self._copies_outputs else outputs


def freezing(weights: Iterable[Any]) -> AbstractContextManager[object]:
    """Return a context in which these weights are compiled as constants, except in float64: oneDNN cannot lay these out."""
    has_doubles = any(isinstance(weight, Tensor) and weight.dtype == torch.float64 for weight in weights)
    return contextlib.nullcontext() if has_doubles else with_frozen_weights()


def _copied(value: Any) -> Any:
    """Return a copy of a tensor, or any other value as it is."""
    return value.clone() if isinstance(value, Tensor) else value
