"""The processes of a run under torchrun: which one this is, where it computes, and what all of them say."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from fastentropy._utils.errors import one_line

T = TypeVar("T")

#: How long a rank waits at a checkpoint for another, whose chunks may be longer. One that dies is noticed at once.
SYNC_TIMEOUT = datetime.timedelta(days=7)
#: What a rank tells the others of an error that no user can mend.
_UNEXPECTED = ""


class RemoteRankError(Exception):
    """Ends a rank quietly: another one raises the error."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; one that runs alone is rank 0 of 1."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Call a function on every rank. Where it raises on any of them, all of them end.

        What a user can mend is raised by the first rank, as one line, and anything else where it came up.
        """
        try:
            result, error = function(), None
        except (ValueError, OSError) as raised:
            result, error = None, one_line(raised)
        except Exception:
            self.gather(_UNEXPECTED)
            raise
        errors = self.gather(error)
        if _UNEXPECTED in errors:
            raise RemoteRankError
        for rank, said in enumerate(errors):
            if said is not None:
                self.fail(f"rank {rank}: {said}" if rank else said)
        # It is None only where the function failed, which has raised by now.
        return result  # type: ignore[return-value]

    def run_on_first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank alone: it gives what it returns to all, and errors are those of `run_on_all`."""
        # What the first rank has is not None.
        return self.broadcast(self.run_on_all(lambda: function() if self.is_first else None))  # type: ignore[return-value]

    def require_equal(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError, on the first rank alone, where the ranks have different settings."""
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            if names := differing(first, other):
                self.fail(f"ranks 0 and {rank} have another {', '.join(names)}; give all ranks the same files and arguments")

    def fail(self, message: str) -> NoReturn:
        """End all ranks with an error that one of them raises; to be called by all."""
        if self.is_first:
            raise ValueError(message)
        raise RemoteRankError


@contextlib.contextmanager
def init_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started, joined for the time of the block; this process alone where it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=SYNC_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The names of the settings in which two runs differ."""
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]
