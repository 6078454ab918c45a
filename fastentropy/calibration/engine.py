"""Run a model over a corpus while its activations are counted, on all ranks, with a checkpoint every so many chunks.

Chunk u is of rank u % ranks. Ranks do not wait for each other but at checkpoints, where one all-reduce sums their counts.
"""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastentropy.calibration.batching import Batch, ImageBatches, TextBatches
from fastentropy.calibration.checkpoints import Checkpoint, Tally
from fastentropy.calibration.corpora import Corpus
from fastentropy.calibration.documents import Chunk
from fastentropy.calibration.overhead import Overhead
from fastentropy.calibration.pretrained import Pretrained
from fastentropy.calibration.ranks import Ranks
from fastentropy.collector import EntropyCollector
from fastentropy.statistics import Statistics


class Display(Protocol):
    """Shows how far a run is."""

    def show(self, read: int, tokens: int, tokens_per_second: float, overhead: float | None) -> None:
        """read: bytes of the corpus so far, and tokens: those counted so far, both estimated between checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run. seconds: of all its parts; the rates, and what was measured, are of the last part."""

    statistics: Statistics
    tally: Tally
    chunks: int
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
        """Count what is not counted yet. Raises ValueError where there was nothing to count, or the checkpoint is damaged."""
        state = before = self._ranks.from_first(self._ranks.together(self._resume))
        self._before, self._read = before.tally, self._size_before(before.chunk)
        reader = self._corpus.read(before.chunk + self._ranks.rank, self._ranks.number)
        self._start = time.perf_counter()
        finished = False
        with ThreadPoolExecutor(1) as thread, torch.inference_mode(), self._collector:
            while not finished:
                chunks = itertools.islice(reader, self._every)
                has_ended = self._run_chunks(chunks, state.tally.tokens, thread) < self._every
                finished = all(self._ranks.gather(has_ended))
                state = self._checkpoint(before, state.chunk + self._every * self._ranks.number)
                finished = finished or (self._max_tokens is not None and state.tally.tokens >= self._max_tokens)
        self._display.show(self._corpus.size or 0, state.tally.tokens, self._rate() * self._ranks.number, self._overhead.ratio)
        if not state.tally.tokens:
            self._ranks.fail(f"{self._corpus.source} holds nothing that the model reads: {_first(state.tally)}")
        return self._outcome(before, state)

    def _resume(self) -> Checkpoint:
        """What an earlier part of the run left, on the first rank, whose collector goes on from there."""
        if not self._ranks.is_first or not self._path.exists():
            return Checkpoint(self._settings, Statistics({}), Tally(problems=list(self._corpus.problems)))
        checkpoint = Checkpoint.load(self._path)
        if checkpoint.settings != self._settings:
            names = [name for name, value in self._settings.items() if checkpoint.settings.get(name) != value]
            raise ValueError(
                f"{self._path.parent} holds a run with another {', '.join(names)}; name another folder with --output"
            )
        if checkpoint.statistics:
            self._collector.load_state_dict(checkpoint.statistics.state_dict())
        return checkpoint

    def _run_chunks(self, chunks: Iterable[Chunk], tokens_before: int, thread: ThreadPoolExecutor) -> int:
        """Run some chunks of this rank; returns how many there were."""
        run = 0
        work = self._whole(chunks) if self._max_tokens is None else self._within_budget(chunks, tokens_before)
        for item in _made_ahead(work, thread):
            if isinstance(item, Batch):
                inputs = self._on_device(item)
                self._overhead.run(lambda inputs=inputs: self._pretrained.forward(inputs))  # type: ignore[misc]
                self._tally.add(item)
            else:
                run += 1
                self._tally.met(item.problems)
                self._read += item.size * self._ranks.number
            self._show()
        return run

    def _whole(self, chunks: Iterable[Chunk]) -> Iterator[Batch | Chunk]:
        """The batches of each chunk, and behind them the chunk."""
        for chunk in chunks:
            yield from self._batches.batches(chunk)
            yield chunk

    def _within_budget(self, chunks: Iterable[Chunk], tokens_before: int) -> Iterator[Batch | Chunk]:
        """The same up to the batch that reaches max_tokens: the batches of all ranks count in the order of their chunks."""
        assert self._max_tokens is not None
        made = [(chunk, list(self._batches.batches(chunk))) for chunk in chunks]
        tokens = {chunk.number: sum(batch.tokens for batch in batches) for chunk, batches in made}
        numbered = sorted(pair for of_rank in self._ranks.gather(tokens) for pair in of_rank.items())
        ends = itertools.accumulate((count for _, count in numbered), initial=tokens_before)
        before = dict(zip((number for number, _ in numbered), ends, strict=False))
        for chunk, batches in made:
            counted = before[chunk.number]
            for batch in batches:
                if counted < self._max_tokens:
                    yield batch
                counted += batch.tokens
            yield chunk

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        device, dtype = self._pretrained.device, self._pretrained.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in batch.inputs.items()
        }

    def _checkpoint(self, before: Checkpoint, chunk: int) -> Checkpoint:
        """Sum what all ranks counted since `before`, and write it down together with the next chunk."""
        start = time.perf_counter()
        counted = self._collector.sync()
        self._sync_seconds.append(time.perf_counter() - start)
        tally = sum(self._ranks.gather(self._tally), before.tally)
        seconds = before.seconds + time.perf_counter() - self._start
        state = Checkpoint(self._settings, counted, tally, chunk, seconds)
        self._ranks.together(lambda: state.save(self._path) if self._ranks.is_first else None)
        return state

    def _show(self) -> None:
        ranks = self._ranks.number
        tokens = self._before.tokens + self._tally.tokens * ranks
        self._display.show(self._read, tokens, self._rate() * ranks, self._overhead.ratio)

    def _size_before(self, chunk: int) -> int:
        """About how many bytes lie before a chunk."""
        return (self._corpus.size or 0) * chunk // (self._corpus.chunks or 1)

    def _rate(self) -> float:
        """Tokens of this rank per second, without the batches that were run a second time."""
        return self._tally.tokens / (time.perf_counter() - self._start - self._overhead.plain_seconds)

    def _outcome(self, before: Checkpoint, after: Checkpoint) -> Outcome:
        return Outcome(
            after.statistics,
            after.tally,
            after.chunk,
            after.seconds,
            sum(self._ranks.gather(self._rate())),
            self._overhead.ratio,
            self._overhead.samples,
            statistics.median(self._sync_seconds),
        )


def _made_ahead(items: Iterator[Batch | Chunk], thread: ThreadPoolExecutor) -> Iterator[Batch | Chunk]:
    """The items, each of which is made in a thread while the one before it is used."""
    upcoming = thread.submit(next, items, None)
    while (item := upcoming.result()) is not None:
        upcoming = thread.submit(next, items, None)
        yield item


def _first(tally: Tally) -> str:
    return next(map(str, tally.problems), "it has no text")
