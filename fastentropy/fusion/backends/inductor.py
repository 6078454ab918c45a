"""Run a network compiled by torch.compile with frozen weights on a CPU, and as a CUDA graph on a GPU."""

from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import tree_leaves, tree_map, with_frozen_weights


class Compiled:
    """A network that is compiled in the first call, and again for inputs of other shapes, at most twice (see torch.compile).

    The weights of the first call are part of the compiled code: torch.compile folds batch norm into them and lays them out for
    the machine. A call that needs gradients runs the network as it is.
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
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            return self._network(*inputs, **keywords)
        shapes = tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
        with torch.no_grad():
            if shapes in self._shapes:
                outputs = self._compiled(*inputs, **keywords)
            else:
                # Weights are frozen only if this is switched on while the call compiles. As an option of torch.compile it has
                # no effect, because the weights have become inputs by then.
                with with_frozen_weights():
                    outputs = self._compiled(*inputs, **keywords)
                self._shapes.add(shapes)
        return tree_map(_copied, outputs) if self._copies_outputs else outputs


def _copied(value: Any) -> Any:
    """Return a copy of a tensor, or any other value as it is."""
    return value.clone() if isinstance(value, Tensor) else value
