"""Measure the overhead of collecting during the run itself: some batches are also run without it."""

import statistics
from collections import deque
from collections.abc import Callable

from fastentropy._utils.timing import measure_seconds
from fastentropy.collector.collector import EntropyCollector

#: The first batches of a rank to run twice, when nothing is compiled any more; after that, every multiple of the last.
RUN_TWICE = (4, 8, 16, 32, 64)
#: How many ratios are kept for the median.
MAX_RATIOS = 1001


class Overhead:
    """Runs batches while a collector counts, and a few of them a second time without it."""

    def __init__(self, collector: EntropyCollector) -> None:
        """Measure a collector that is attached to the model."""
        self._collector, self._batches = collector, 0
        self._ratios: deque[float] = deque(maxlen=MAX_RATIOS)
        #: How many batches were run twice, and the seconds that the runs without the collector took.
        self.samples, self.plain_seconds = 0, 0.0

    @property
    def ratio(self) -> float | None:
        """The median ratio of the time of a batch with collecting to that without; None if too few batches were run."""
        return statistics.median(self._ratios) if self._ratios else None

    def run(self, forward: Callable[[], object]) -> None:
        """Run a batch, and count it once."""
        self._batches += 1
        if self._batches not in RUN_TWICE and self._batches % RUN_TWICE[-1]:
            forward()
            return
        if self.samples % 2:  # the order alternates
            counted, plain = measure_seconds(forward), self._plain(forward)
        else:
            plain, counted = self._plain(forward), measure_seconds(forward)
        self._ratios.append(counted / plain)
        self.samples += 1
        self.plain_seconds += plain

    def _plain(self, forward: Callable[[], object]) -> float:
        self._collector.detach()
        try:
            return measure_seconds(forward)
        finally:
            self._collector.attach()
