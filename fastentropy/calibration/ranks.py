"""The ranks of a run: the processes that torchrun started.

All ranks must make the calls of `Ranks` together. If a call fails on one rank, all ranks end, and only rank 0 shows a message.
"""

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

#: How long a rank waits for the others in a collective call. It is long because some ranks may take much longer than others for
#: their chunks (pieces of the data). The death of a rank is noticed at once, not after this time.
SYNC_TIMEOUT = datetime.timedelta(days=7)
#: What a rank sends to the others instead of a message if it raised an error that the user cannot fix.
_UNEXPECTED = ""


class RemoteRankError(Exception):
    """Raised to end this rank without a message, because another rank raises the error itself."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of ranks. Without torchrun, the process is rank 0 of 1."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, the only rank that writes files and messages."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return, on every rank, the list of the values that all ranks passed. A value is any object that can be pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return, on every rank, the value that rank 0 passed. The values of the other ranks are ignored."""
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
            ValueError: on rank 0, if the function raised ValueError or OSError on any rank. These are errors that the user can
                fix. The message is one line. It names the rank unless that is rank 0.
            RemoteRankError: on the other ranks in this case. If a rank raised any other exception, it raises that exception
                again, and all other ranks raise RemoteRankError.
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
        """Call a function on rank 0 only, and return its result on every rank. Errors are raised as by `run_on_all`."""
        # The value that rank 0 passes is the result of the function, not None.
        return self.broadcast(self.run_on_all(lambda: function() if self.is_first else None))  # type: ignore[return-value]

    def require_equal(self, settings: Mapping[str, Any]) -> None:
        """End all ranks if they have different settings. Rank 0 raises a ValueError that names the differences."""
        first, *others = self.gather(settings)
        for rank, other in enumerate(others, 1):
            if names := differing(first, other):
                self.fail(f"ranks 0 and {rank} differ in {', '.join(names)}; give all ranks the same files and arguments")

    def fail(self, message: str) -> NoReturn:
        """End all ranks: rank 0 raises ValueError(message), and the others raise RemoteRankError. All ranks must call it."""
        if self.is_first:
            raise ValueError(message)
        raise RemoteRankError


@contextlib.contextmanager
def init_ranks() -> Iterator[Ranks]:
    """Join the process group of the ranks that torchrun started, for the duration of a block. Without torchrun, do nothing."""
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
    """Return the names of the settings whose values differ between two mappings. A missing setting counts as None."""
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]
