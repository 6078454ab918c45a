"""Run a model over a corpus while its activations are counted, on all ranks, with regular checkpoints.

Rank r reads the chunks r, r + world size, r + 2 × world size and so on. Ranks wait for each other only at checkpoints, where
one all-reduce sums their counts; and after each chunk if the run ends at a number of tokens.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fastentropy._utils.errors import one_line
from fastentropy.calibration.checkpoints import Checkpoint, Tally
from fastentropy.calibration.data.batching import Batch, ImageBatches, TextBatches
from fastentropy.calibration.data.corpus import Corpus
from fastentropy.calibration.data.documents import Chunk
from fastentropy.calibration.overhead import Overhead
from fastentropy.calibration.pretrained import Pretrained
from fastentropy.calibration.ranks import Ranks, differing
from fastentropy.collector.collector import EntropyCollector
from fastentropy.collector.statistics import Statistics
from fastentropy.sites.finding import no_sites

T = TypeVar("T")


class Display(Protocol):
    """Shows the progress of a run."""

    def show(self, read: int, tokens: int, tokens_per_second: float, overhead: float | None) -> None:
        """Show the progress.

        Args:
            read: bytes of the corpus so far. Like `tokens`, an estimate between checkpoints.
            tokens: tokens counted so far.
            tokens_per_second: the rate of all ranks.
            overhead: time while collecting relative to the time without, or None.
        """


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    `seconds` covers all parts of a run that was interrupted; rates and measurements cover the last part.
    """

    statistics: Statistics
    tally: Tally
    seconds: float
    tokens_per_second: float
    overhead: float | None
    overhead_samples: int
    sync_seconds: float


class Calibration:
    """A run of a model over a corpus."""

    def __init__(
        self,
        pretrained: Pretrained,
        corpus: Corpus,
        batches: TextBatches | ImageBatches,
        collector: EntropyCollector,
        ranks: Ranks,
        *,
        settings: dict[str, Any],
        path: Path,
        every: int,
        max_tokens: int | None,
        display: Display,
    ) -> None:
        """Prepare a run.

        Args:
            pretrained: the model.
            corpus: the data.
            batches: makes the batches of a chunk.
            collector: counts the activations of the model.
            ranks: this process among all of them.
            settings: the settings that determine the counts.
            path: the file of the checkpoint.
            every: how many chunks a rank runs between two checkpoints.
            max_tokens: end at the batch that reaches this number of tokens; None for no limit.
            display: shows the progress.
        """
        self._pretrained, self._corpus, self._batches, self._collector = pretrained, corpus, batches, collector
        self._ranks, self._settings, self._path, self._every = ranks, settings, path, every
        self._max_tokens, self._display = max_tokens, display
        self._tally, self._overhead = Tally(), Overhead(collector)
        self._before, self._read, self._start, self._sync_seconds = Tally(), 0, 0.0, list[float]()

    def run(self) -> Outcome:
        """Count the chunks that are not counted yet.

        Raises:
            ValueError: there is nothing to count, the checkpoint is damaged or belongs to another run, or reading fails.
        """
        state = before = self._ranks.run_on_first(self._resume)
        self._before, self._read = before.tally, self._size_before(before.chunk)
        reader = self._corpus.read(before.chunk + self._ranks.rank, self._ranks.world_size)
        self._start = time.perf_counter()
        finished = False
        with ThreadPoolExecutor(1) as thread, torch.inference_mode(), self._collector:
            run_round = self._make_round(reader, thread)
            while not finished:
                finished = run_round(state.tally.tokens)
                state = self._checkpoint(before, state.chunk + self._every * self._ranks.world_size)
        self._display.show(
            self._corpus.size or 0, state.tally.tokens, self._rate() * self._ranks.world_size, self._overhead.ratio
        )
        if not state.tally.tokens:
            reason = next(map(str, state.tally.problems), f"it has no {self._corpus.kind}")
            self._ranks.fail(f"{self._corpus.source} holds nothing that the model can read: {reason}")
        return self._outcome(state)

    def _resume(self) -> Checkpoint:
        """Load the checkpoint, if there is one, and pass its counts to the collector of this rank."""
        if not self._path.exists():
            return Checkpoint(self._settings, Statistics({}), Tally(problems=list(self._corpus.problems)))
        checkpoint = Checkpoint.load(self._path)
        if names := differing(checkpoint.settings, self._settings):
            raise ValueError(
                f"{self._path.parent} holds a run that differs in {', '.join(names)}; name another folder with --output"
            )
        if checkpoint.statistics:
            self._collector.load_state_dict(checkpoint.statistics.state_dict())
        return checkpoint

    def _make_round(self, reader: Iterator[Chunk], thread: ThreadPoolExecutor) -> Callable[[int], bool]:
        """Return a function that runs the chunks up to the next checkpoint.

        It takes the number of tokens so far, and returns whether these chunks were the last.
        """
        if self._max_tokens is None:
            work = _prefetch(self._batches_and_chunks(reader), thread)
            return lambda tokens: self._run_chunks(work)
        whole = _prefetch(self._whole_chunks(reader, self._max_tokens), thread)
        return functools.partial(self._run_until, self._max_tokens, whole)

    def _batches_and_chunks(self, chunks: Iterable[Chunk]) -> Iterator[Batch | Chunk]:
        """Yield the batches of each chunk, followed by the chunk."""
        for chunk in chunks:
            yield from self._batches.batches(chunk)
            yield chunk

    def _run_chunks(self, work: Iterator[Batch | Chunk]) -> bool:
        """Run chunks, each rank its own; return whether they were the last."""

        def run() -> int:
            number = 0
            while number < self._every and (item := next(work, None)) is not None:
                if isinstance(item, Batch):
                    self._run_batch(item)
                else:
                    self._end_chunk(item)
                    number += 1
            return number

        number = self._ranks.run_on_all(run)
        return all(self._ranks.gather(number < self._every))

    def _whole_chunks(self, chunks: Iterable[Chunk], tokens: int) -> Iterator[tuple[Chunk, list[Batch]]]:
        """Yield each chunk with its batches, up to the one that reaches a number of tokens."""
        for chunk in chunks:
            yield chunk, list(_take_until(tokens, self._batches.batches(chunk)))

    def _run_until(self, max_tokens: int, whole: Iterator[tuple[Chunk, list[Batch]]], tokens: int) -> bool:
        """Run chunks, on all ranks in step, up to the batch that reaches max_tokens; return whether they were the last.

        Batches count in the order of their chunks, so that the same batches are run on any number of ranks.
        """
        for _ in range(self._every):
            if tokens >= max_tokens:
                break
            mine = self._ranks.run_on_all(lambda: next(whole, None))
            counts = self._ranks.gather(mine and sum(batch.tokens for batch in mine[1]))
            room = max_tokens - tokens - sum(count or 0 for count in counts[: self._ranks.rank])
            self._ranks.run_on_all(functools.partial(self._run_within, room, mine))
            tokens += sum(count or 0 for count in counts)
            if all(count is None for count in counts):
                return True
        return tokens >= max_tokens

    def _run_within(self, tokens: int, mine: tuple[Chunk, list[Batch]] | None) -> None:
        """Run the batches of a chunk up to the one that reaches a number of tokens; none if that number is not positive."""
        if mine is not None and tokens > 0:
            chunk, batches = mine
            for batch in _take_until(tokens, iter(batches)):
                self._run_batch(batch)
            self._end_chunk(chunk)

    def _run_batch(self, batch: Batch) -> None:
        inputs = self._on_device(batch)
        try:
            self._overhead.run(lambda: self._pretrained.forward(inputs))
        except RuntimeError as error:  # out of memory, or an activation that cannot be followed
            raise ValueError(f"{self._pretrained.name} failed on a batch: {one_line(error)}") from error
        self._tally.add(batch)
        self._show()

    def _end_chunk(self, chunk: Chunk) -> None:
        self._tally.add_problems(chunk.problems)
        self._read += chunk.size * self._ranks.world_size
        self._show()

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        device, dtype = self._pretrained.device, self._pretrained.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in batch.inputs.items()
        }

    def _checkpoint(self, before: Checkpoint, chunk: int) -> Checkpoint:
        """Sum the counts of all ranks since `before`. If there are any, write them with the number of the next chunk."""
        start = time.perf_counter()
        counted = self._ranks.run_on_all(self._collector.sync)
        self._sync_seconds.append(time.perf_counter() - start)
        tally = sum(self._ranks.gather(self._tally), before.tally)
        seconds = before.seconds + time.perf_counter() - self._start
        state = Checkpoint(self._settings, counted, tally, chunk, seconds)
        if tally.tokens:
            if not counted:
                self._ranks.fail(no_sites(self._pretrained.model))
            self._ranks.run_on_first(lambda: self._save(state))
        return state

    def _save(self, state: Checkpoint) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        state.save(self._path)

    def _show(self) -> None:
        ranks = self._ranks.world_size
        tokens = self._before.tokens + self._tally.tokens * ranks
        self._display.show(self._read, tokens, self._rate() * ranks, self._overhead.ratio)

    def _size_before(self, chunk: int) -> int:
        """Estimate how many bytes of the corpus precede a chunk."""
        return (self._corpus.size or 0) * chunk // (self._corpus.chunks or 1)

    def _rate(self) -> float:
        """Return the tokens per second of this rank, without the time of batches that were run a second time."""
        return self._tally.tokens / (time.perf_counter() - self._start - self._overhead.plain_seconds)

    def _outcome(self, after: Checkpoint) -> Outcome:
        return Outcome(
            after.statistics,
            after.tally,
            after.seconds,
            sum(self._ranks.gather(self._rate())) or after.tally.tokens / after.seconds,
            self._overhead.ratio,
            self._overhead.samples,
            statistics.median(self._sync_seconds),
        )


def _prefetch(items: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """Yield the items. A thread makes each of them while the previous one is used."""
    upcoming = thread.submit(next, items, None)
    while (item := upcoming.result()) is not None:
        upcoming = thread.submit(next, items, None)
        yield item


def _take_until(tokens: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches up to the one that reaches a number of tokens; the following ones are not made."""
    while tokens > 0 and (batch := next(batches, None)) is not None:
        yield batch
        tokens -= batch.tokens
