"""The processes of a run under torchrun: collective calls whose errors end all ranks with one message."""

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

#: How long a rank waits at a checkpoint for another, whose chunks may take longer. A rank that dies is noticed at once.
SYNC_TIMEOUT = datetime.timedelta(days=7)
#: Sent to the other ranks, in place of a message, for an error that the user cannot fix.
_UNEXPECTED = ""


class RemoteRankError(Exception):
    """Ends this rank without a message, because another rank raises the error."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of ranks; a process without torchrun is rank 0 of 1."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Return whether this rank writes files and messages for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Call a function on every rank. If it raises on any rank, all ranks end.

        Returns:
            What the function returned on this rank.

        Raises:
            ValueError: on rank 0, with one line, if any rank raised ValueError or OSError: errors that the user can fix.
            RemoteRankError: on the other ranks then, and if another rank raised any other exception.
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
        # If the function failed, one of the lines above has raised.
        return result  # type: ignore[return-value]

    def run_on_first(self, function: Callable[[], T]) -> T:
        """Run on rank 0 and broadcast the result. Raises what `run_on_all` raises."""
        # The value of rank 0 is the function's, not None.
        return self.broadcast(self.run_on_all(lambda: function() if self.is_first else None))  # type: ignore[return-value]

    def require_equal(self, settings: Mapping[str, Any]) -> None:
        """End all ranks, with a ValueError on rank 0, if they have different settings."""
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            if names := differing(first, other):
                self.fail(f"ranks 0 and {rank} differ in {', '.join(names)}; give all ranks the same files and arguments")

    def fail(self, message: str) -> NoReturn:
        """End all ranks: rank 0 raises ValueError, the others RemoteRankError. All ranks must call it."""
        if self.is_first:
            raise ValueError(message)
        raise RemoteRankError


@contextlib.contextmanager
def init_ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, for the duration of the block; without torchrun, this process alone."""
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
    """Return the names of the settings in which two runs differ."""
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]
