"""Run a model over a corpus while its activations are counted, on all ranks, with a checkpoint every so many chunks.

Chunk u is of rank u % ranks. Ranks do not wait for each other but at checkpoints, where one all-reduce sums their counts, and
where a number of tokens ends the run, after each chunk.
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
    """Shows how far a run is."""

    def show(self, read: int, tokens: int, tokens_per_second: float, overhead: float | None) -> None:
        """read: bytes of the corpus so far, and tokens: those counted so far, both estimated between checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run. seconds: of all its parts; the rates, and what was measured, are of the last part."""

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
        """settings: what decides the counts. path: of the checkpoint. every: chunks of a rank between two of them."""
        self._pretrained, self._corpus, self._batches, self._collector = pretrained, corpus, batches, collector
        self._ranks, self._settings, self._path, self._every = ranks, settings, path, every
        self._max_tokens, self._display = max_tokens, display
        self._tally, self._overhead = Tally(), Overhead(collector)
        self._before, self._read, self._start, self._sync_seconds = Tally(), 0, 0.0, list[float]()

    def run(self) -> Outcome:
        """Count what is not counted yet.

        Raises ValueError where there was nothing to count, the checkpoint is damaged or of another run, or data breaks off.
        """
        state = before = self._ranks.run_on_first(self._resume)
        self._before, self._read = before.tally, self._size_before(before.chunk)
        reader = self._corpus.read(before.chunk + self._ranks.rank, self._ranks.world_size)
        self._start = time.perf_counter()
        finished = False
        with ThreadPoolExecutor(1) as thread, torch.inference_mode(), self._collector:
            run_round = self._rounds(reader, thread)
            while not finished:
                finished = run_round(state.tally.tokens)
                state = self._checkpoint(before, state.chunk + self._every * self._ranks.world_size)
        self._display.show(
            self._corpus.size or 0, state.tally.tokens, self._rate() * self._ranks.world_size, self._overhead.ratio
        )
        if not state.tally.tokens:
            reason = next(map(str, state.tally.problems), f"it has no {self._corpus.kind}")
            self._ranks.fail(f"{self._corpus.source} holds nothing that the model reads: {reason}")
        return self._outcome(state)

    def _resume(self) -> Checkpoint:
        """What an earlier part of the run left; the collector of the rank that calls this goes on from there."""
        if not self._path.exists():
            return Checkpoint(self._settings, Statistics({}), Tally(problems=list(self._corpus.problems)))
        checkpoint = Checkpoint.load(self._path)
        if names := differing(checkpoint.settings, self._settings):
            raise ValueError(
                f"{self._path.parent} holds a run with another {', '.join(names)}; name another folder with --output"
            )
        if checkpoint.statistics:
            self._collector.load_state_dict(checkpoint.statistics.state_dict())
        return checkpoint

    def _rounds(self, reader: Iterator[Chunk], thread: ThreadPoolExecutor) -> Callable[[int], bool]:
        """What runs the chunks up to a checkpoint, after so many tokens; it returns whether these were the last."""
        if self._max_tokens is None:
            work = _made_ahead(self._batches_and_chunks(reader), thread)
            return lambda tokens: self._run_chunks(work)
        whole = _made_ahead(self._whole_chunks(reader, self._max_tokens), thread)
        return functools.partial(self._run_up_to, self._max_tokens, whole)

    def _batches_and_chunks(self, chunks: Iterable[Chunk]) -> Iterator[Batch | Chunk]:
        """The batches of each chunk, and behind them the chunk."""
        for chunk in chunks:
            yield from self._batches.batches(chunk)
            yield chunk

    def _run_chunks(self, work: Iterator[Batch | Chunk]) -> bool:
        """Run chunks, each rank its own."""

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
        """Each chunk with its batches, but no more of them than hold so many tokens."""
        for chunk in chunks:
            yield chunk, list(_up_to(tokens, self._batches.batches(chunk)))

    def _run_up_to(self, max_tokens: int, whole: Iterator[tuple[Chunk, list[Batch]]], tokens: int) -> bool:
        """Run chunks, those of all ranks together, up to the batch that reaches max_tokens.

        Batches count in the order of their chunks, so that they are the same on any number of ranks.
        """
        for _ in range(self._every):
            if tokens >= max_tokens:
                break
            mine = self._ranks.run_on_all(lambda: next(whole, None))
            counts = self._ranks.gather(mine and sum(batch.tokens for batch in mine[1]))
            room = max_tokens - tokens - sum(count or 0 for count in counts[: self._ranks.rank])
            # The types of a lambda's defaults are not inferred.
            self._ranks.run_on_all(lambda mine=mine, room=room: self._run_within(room, *mine) if mine else None)  # type: ignore[misc]
            tokens += sum(count or 0 for count in counts)
            if all(count is None for count in counts):
                return True
        return tokens >= max_tokens

    def _run_within(self, tokens: int, chunk: Chunk, batches: Iterable[Batch]) -> None:
        """Run the batches of a chunk up to the one that reaches so many tokens; none where there is no room for any."""
        if tokens > 0:
            for batch in _up_to(tokens, iter(batches)):
                self._run_batch(batch)
            self._end_chunk(chunk)

    def _run_batch(self, batch: Batch) -> None:
        inputs = self._on_device(batch)
        try:
            self._overhead.run(lambda: self._pretrained.forward(inputs))
        except RuntimeError as error:  # out of memory, or an activation that cannot be followed
            raise ValueError(f"{self._pretrained.name} cannot run a batch: {one_line(error)}") from error
        self._tally.add(batch)
        self._show()

    def _end_chunk(self, chunk: Chunk) -> None:
        self._tally.met(chunk.problems)
        self._read += chunk.size * self._ranks.world_size
        self._show()

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        device, dtype = self._pretrained.device, self._pretrained.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in batch.inputs.items()
        }

    def _checkpoint(self, before: Checkpoint, chunk: int) -> Checkpoint:
        """Sum what all ranks counted since `before`, and write it down together with the next chunk, if it is anything."""
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
        """About how many bytes lie before a chunk."""
        return (self._corpus.size or 0) * chunk // (self._corpus.chunks or 1)

    def _rate(self) -> float:
        """Tokens of this rank per second, without the batches that were run a second time."""
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


def _made_ahead(items: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """The items, each of which is made in a thread while the one before it is used."""
    upcoming = thread.submit(next, items, None)
    while (item := upcoming.result()) is not None:
        upcoming = thread.submit(next, items, None)
        yield item


def _up_to(tokens: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches up to the one with which they reach so many tokens; what follows is not made."""
    while tokens > 0 and (batch := next(batches, None)) is not None:
        yield batch
        tokens -= batch.tokens
