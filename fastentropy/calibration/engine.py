"""Run a model over a corpus on all ranks and count its activations, with regular checkpoints.

The corpus is divided into chunks, numbered pieces of some hundred kilobytes. Rank r reads the chunks r, r + world size,
r + 2 × world size and so on. Ranks wait for each other at checkpoints, where their counts are summed. If the run has a limit of
tokens, they also wait for each other after each chunk, because the tokens of all ranks count towards the limit.
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
    """Receives the progress of a run, to show it to the user."""

    def show(self, read: int, tokens: int, tokens_per_second: float, overhead: float | None) -> None:
        """Show the progress. During the run, the numbers of all ranks are estimated from those of this rank.

        Args:
            read: how many bytes of the corpus all ranks have read so far.
            tokens: how many tokens (or images) all ranks have counted so far.
            tokens_per_second: the tokens (or images) per second of all ranks.
            overhead: the time of a batch with counting divided by its time without, or None if it is not measured yet.
        """


@dataclass(frozen=True)
class Outcome:
    """The result of a run. If the run was interrupted, the rates and times except `seconds` are those of its last part.

    Attributes:
        statistics: the counts of all activations, summed over ranks.
        tally: the totals of the data, summed over ranks.
        seconds: the time of the run, including the parts before interruptions.
        tokens_per_second: the tokens (or images) per second of all ranks.
        overhead: the time of a batch with counting divided by its time without, the median over some batches of this rank. None
            if the run was too short to measure it.
        overhead_samples: the number of these batches.
        sync_seconds: the median time of a sum over ranks at a checkpoint.
    """

    statistics: Statistics
    tally: Tally
    seconds: float
    tokens_per_second: float
    overhead: float | None
    overhead_samples: int
    sync_seconds: float


class Calibration:
    """A run of a model over a corpus. All ranks create one and call `run` at the same time."""

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
            batches: makes batches of the documents of a chunk.
            collector: the collector that counts the activations of the model. The run attaches and detaches it.
            ranks: the rank of this process and the number of ranks.
            settings: the settings that determine the counts, by name. They are stored in the checkpoint.
            path: the file of the checkpoint. If it exists, the run continues from it.
            every: how many chunks each rank reads between two checkpoints.
            max_tokens: end the run at the batch that reaches this number of tokens (or images); None for no limit.
            display: receives the progress.
        """
        self._pretrained, self._corpus, self._batches, self._collector = pretrained, corpus, batches, collector
        self._ranks, self._settings, self._path, self._every = ranks, settings, path, every
        self._max_tokens, self._display = max_tokens, display
        self._tally, self._overhead = Tally(), Overhead(collector)
        self._before, self._read, self._start, self._sync_seconds = Tally(), 0, 0.0, list[float]()

    def run(self) -> Outcome:
        """Run the model over all chunks that the checkpoint does not include.

        Returns:
            The result, equal on all ranks except for the measured times.

        Raises:
            ValueError: on rank 0, if the corpus holds nothing that the model can read, the model has no known activation or
                fails on a batch, the checkpoint is damaged or has other settings, or reading fails.
            RemoteRankError: on the other ranks, or if another rank raised an unexpected error.
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
        """Return the checkpoint that the run continues from; an empty one if there is no file.

        Only rank 0 calls this. Its collector takes over the counts, so the sum over ranks includes them once.
        """
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
        """Return a function that runs the chunks between two checkpoints.

        The function takes the number of tokens that all ranks have counted so far, and returns whether the run is at its end.

        Args:
            reader: yields the chunks of this rank.
            thread: a thread in which the batches are made ahead of their use.
        """
        if self._max_tokens is None:
            work = _prefetch(self._batches_and_chunks(reader), thread)
            return lambda tokens: self._run_chunks(work)
        whole = _prefetch(self._whole_chunks(reader, self._max_tokens), thread)
        return functools.partial(self._run_until, self._max_tokens, whole)

    def _batches_and_chunks(self, chunks: Iterable[Chunk]) -> Iterator[Batch | Chunk]:
        """Yield the batches of each chunk one by one, followed by the chunk itself as the mark of its end."""
        for chunk in chunks:
            yield from self._batches.batches(chunk)
            yield chunk

    def _run_chunks(self, work: Iterator[Batch | Chunk]) -> bool:
        """Run this rank's chunks up to the next checkpoint, without a limit of tokens.

        Args:
            work: what `_batches_and_chunks` yields.

        Returns:
            Whether all ranks have read all of their chunks.
        """

        def run() -> int:
            """Run the chunks, and return how many there were."""
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
        """Yield each chunk with a list of its batches.

        The list ends at the batch with which the chunk alone reaches `tokens`, because later batches are never needed.
        """
        for chunk in chunks:
            yield chunk, list(_take_until(tokens, self._batches.batches(chunk)))

    def _run_until(self, max_tokens: int, whole: Iterator[tuple[Chunk, list[Batch]]], tokens: int) -> bool:
        """Run this rank's chunks up to the next checkpoint or to the limit of tokens.

        The ranks run one chunk each at the same time. The tokens count towards the limit in the order of the chunks' numbers,
        so the same batches are run on any number of ranks.

        Args:
            max_tokens: the limit. The batch that reaches it is the last one that is run.
            whole: what `_whole_chunks` yields.
            tokens: how many tokens all ranks have counted so far.

        Returns:
            Whether the limit is reached, or all ranks have read all of their chunks.
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
        """Run the batches of a chunk, and end at the batch with which they reach `tokens` tokens.

        If `tokens` is not positive, or `mine` is None because this rank has no chunk left, nothing is run.
        """
        if mine is not None and tokens > 0:
            chunk, batches = mine
            for batch in _take_until(tokens, iter(batches)):
                self._run_batch(batch)
            self._end_chunk(chunk)

    def _run_batch(self, batch: Batch) -> None:
        """Run the model on a batch while its activations are counted, and add the batch to the totals of this rank."""
        inputs = self._on_device(batch)
        try:
            shape = tuple(value.shape for value in inputs.values())
            self._overhead.run(lambda: self._pretrained.forward(inputs), shape)
        except RuntimeError as error:  # out of memory, or an activation that cannot be followed
            raise ValueError(f"{self._pretrained.name} failed on a batch: {one_line(error)}") from error
        self._tally.add(batch)
        self._show()

    def _end_chunk(self, chunk: Chunk) -> None:
        """Add the problems of a chunk, whose batches have been run, to the totals of this rank, and show the progress."""
        self._tally.add_problems(chunk.problems)
        self._read += chunk.size * self._ranks.world_size
        self._show()

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the inputs of a batch on the device of the model, floating-point ones in the dtype of its weights."""
        device, dtype = self._pretrained.device, self._pretrained.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in batch.inputs.items()
        }

    def _checkpoint(self, before: Checkpoint, chunk: int) -> Checkpoint:
        """Sum the counts and totals of all ranks, and write the checkpoint if any tokens (or images) were counted.

        Args:
            before: the checkpoint that this part of the run began with. Its totals are added to those of the ranks. Its
                counts are in the collector of rank 0 already.
            chunk: the number of the next chunk to read.

        Returns:
            The new checkpoint, equal on all ranks except for the seconds.
        """
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
        """Write the checkpoint, and create its folder if needed."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        state.save(self._path)

    def _show(self) -> None:
        """Show the progress, estimated from that of this rank."""
        ranks = self._ranks.world_size
        tokens = self._before.tokens + self._tally.tokens * ranks
        self._display.show(self._read, tokens, self._rate() * ranks, self._overhead.ratio)

    def _size_before(self, chunk: int) -> int:
        """Estimate how many bytes of the corpus precede a chunk."""
        return (self._corpus.size or 0) * chunk // (self._corpus.chunks or 1)

    def _rate(self) -> float:
        """Return the tokens per second of this rank. Time in which batches were run again without counting is left out."""
        return self._tally.tokens / (time.perf_counter() - self._start - self._overhead.plain_seconds)

    def _outcome(self, after: Checkpoint) -> Outcome:
        """Return the result of the run. All ranks must call it.

        If this part of the run had nothing left to do, the tokens per second are those of the whole run.

        Args:
            after: the last checkpoint.
        """
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
    """Yield the items of an iterator. The thread computes the next item while the caller uses the current one."""
    upcoming = thread.submit(next, items, None)
    while (item := upcoming.result()) is not None:
        upcoming = thread.submit(next, items, None)
        yield item


def _take_until(tokens: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, and end at the one with which they reach `tokens` tokens. No batch after it is taken from the iterator."""
    while tokens > 0 and (batch := next(batches, None)) is not None:
        yield batch
        tokens -= batch.tokens
