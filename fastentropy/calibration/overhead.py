"""What collecting costs, measured on the run itself: some batches are also run without it."""

import statistics
from collections import deque
from collections.abc import Callable

from fastentropy._utils.timing import measure_seconds
from fastentropy.collector.collector import EntropyCollector

#: The first batches of a rank that are run twice, in which nothing is compiled any more; from the last on, one in so many.
RUN_TWICE = (4, 8, 16, 32, 64)
#: Ratios that are kept, of which the median is told.
MOST_RATIOS = 1001


class Overhead:
    """Runs batches while a collector counts, and a few without it, too."""

    def __init__(self, collector: EntropyCollector) -> None:
        """collector: attached to the model that is run."""
        self._collector, self._batches = collector, 0
        self._ratios: deque[float] = deque(maxlen=MOST_RATIOS)
        #: How many batches were run twice, and the seconds that it took without the collector.
        self.samples, self.plain_seconds = 0, 0.0

    @property
    def ratio(self) -> float | None:
        """The median time of a batch while collecting over that without, None where too few batches were run."""
        return statistics.median(self._ratios) if self._ratios else None

    def run(self, forward: Callable[[], object]) -> None:
        """Run a batch, counted once."""
        self._batches += 1
        if self._batches not in RUN_TWICE and self._batches % RUN_TWICE[-1]:
            forward()
            return
        if self.samples % 2:  # each goes first as often as the other
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
