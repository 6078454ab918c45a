"""Modes that a user may have active while a collector is attached."""

from torch.utils._python_dispatch import TorchDispatchMode


class RecordsOperators(TorchDispatchMode):
    """A mode that records which operators run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))
