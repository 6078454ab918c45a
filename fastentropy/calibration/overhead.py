"""Measure the overhead of counting activations during a run: some batches are run once with counting and once without."""

import statistics
from collections import deque
from collections.abc import Callable, Hashable

from fastentropy._utils.timing import measure_seconds
from fastentropy.collector.collector import EntropyCollector

#: The numbers, counted from 1, of the first batches that a rank runs twice. After them, it runs every multiple of the last one
#: twice. The earliest batches are not measured, because kernels are compiled during them.
RUN_TWICE = (4, 8, 16, 32, 64)
#: How many shapes of batches torch.compile meets until it compiles for no other. The first batch of each is not measured.
COMPILED_SHAPES = 3
#: How many of the latest ratios are kept. The overhead is their median.
MAX_RATIOS = 1001


class Overhead:
    """Runs batches while a collector counts their activations, and runs a few of them a second time without the collector."""

    def __init__(self, collector: EntropyCollector) -> None:
        """Measure the overhead of a collector, which is attached to the model whenever `run` is called."""
        self._collector, self._batches, self._shapes = collector, 0, set[Hashable]()
        self._ratios: deque[float] = deque(maxlen=MAX_RATIOS)
        #: The number of batches that were run twice, and the seconds that their runs without the collector took together.
        self.samples, self.plain_seconds = 0, 0.0

    @property
    def ratio(self) -> float | None:
        """The median of the time of a batch with counting divided by its time without; None if no batch was run twice yet."""
        return statistics.median(self._ratios) if self._ratios else None

    def run(self, forward: Callable[[], object], shape: Hashable = None) -> None:
        """Run a batch of a shape by calling `forward`, once or several times. In any case its activations are counted once."""
        self._batches += 1
        compiles = shape not in self._shapes and len(self._shapes) < COMPILED_SHAPES
        self._shapes |= {shape} if compiles else set()
        if compiles or (self._batches not in RUN_TWICE and self._batches % RUN_TWICE[-1]):
            forward()
            return
        if not self.samples:
            self._plain(forward)  # code of torch.compile is compiled once more without counting
        if self.samples % 2:  # the order alternates
            counted, plain = measure_seconds(forward), self._plain(forward)
        else:
            plain, counted = self._plain(forward), measure_seconds(forward)
        self._ratios.append(counted / plain)
        self.samples += 1
        self.plain_seconds += plain

    def _plain(self, forward: Callable[[], object]) -> float:
        """Run a batch without the collector, and return the seconds that it took."""
        self._collector.detach()
        try:
            return measure_seconds(forward)
        finally:
            self._collector.attach()
