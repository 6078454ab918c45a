"""Share the constants that are equal in several forms of a network, since each copy of all weights takes much memory."""

from collections import defaultdict
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from fastentropy._compat import storage_id


class SharedTensors:
    """The constants of several graphs. Of equal ones in different graphs, one is kept; a graph holds each of its own."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """Begin with tensors that graphs may share. They are not kept alive."""
        self._known: dict[Hashable, list[TensorWeakRef]] = defaultdict(list)
        for tensor in tensors:
            self._known[_layout(tensor)].append(TensorWeakRef(tensor))

    def shared(self, tensor: Tensor, taken: set[int] | None = None) -> Tensor:
        """Return a tensor equal to the given one: a known one if there is one, otherwise the given one, known from now on.

        Args:
            tensor: a dense tensor.
            taken: the storages that the graph holds already. That of the result is added. The result is a copy if all equal
                tensors lie in these, since new weights may be loaded into each tensor of a graph.
        """
        held = taken if taken is not None else set()
        references = self._known[_layout(tensor)]
        known = [other for each in references if (other := each()) is not None]
        free = (other for other in (*known, tensor) if storage_id(other) not in held)
        result = next((other for other in free if other is tensor or torch.equal(other, tensor)), None)
        if result is None:
            result = tensor.clone()
        if all(result is not other for other in known):
            references.append(TensorWeakRef(result))
        held.add(storage_id(result))
        return result


def _layout(x: Tensor) -> Hashable:
    """Return what equal constants have in common besides their values."""
    return x.shape, x.stride(), x.dtype, x.device
