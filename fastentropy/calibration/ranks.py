"""The processes of a run under torchrun: which one this is, where it computes, and what all of them say."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

#: How long a rank waits for another, which may have to decode a large chunk.
PATIENCE = datetime.timedelta(hours=1)


class SaidByFirstRank(Exception):  # noqa: N818
    """Ends a rank quietly: the first one raises the error."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; one that runs alone is rank 0 of 1."""

    rank: int
    number: int

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.number == 1:
            return [value]
        values: list[Any] = [None] * self.number
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.number == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def together(self, function: Callable[[], T]) -> T:
        """Call a function on every rank. Where a user's error comes of it on any, the first rank raises it, and all end."""
        result, error = None, None
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = str(raised)
        errors = self.gather(error)
        if any(errors):
            self.fail(next(f"rank {rank}: {said}" for rank, said in enumerate(errors) if said) if None in errors else errors[0])
        return result  # type: ignore[return-value]

    def agree(self, value: str, what: str) -> None:
        """Raise ValueError, on the first rank alone, where the ranks have different values of something."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                self.fail(f"ranks 0 and {rank} have different {what}; give all ranks the same files and arguments")

    def fail(self, message: str | None) -> None:
        """End all ranks with an error that one of them raises; to be called by all."""
        if self.is_first:
            raise ValueError(message)
        raise SaidByFirstRank


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, joined for the time of the block; this process alone where it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
