"""Find the neurons that were in one state, on or off, for all of the data that was counted."""

from dataclasses import dataclass

from fastentropy._utils.text import format_integer, format_table, plural
from fastentropy.collector.statistics import Statistics, check_statistics


@dataclass(frozen=True)
class IdleNeurons:
    """Hold the neurons of one site (call of an activation) that never changed their state.

    Zero (an input of exactly 0) fits both states. A neuron whose inputs were all zero is in `never_on`.

    Attributes:
        neurons: the number of neurons of the site.
        never_on: the indices of the neurons whose input was never above 0. A ReLU returns 0 for them.
        never_off: the indices of the neurons whose input was never below 0, and sometimes above. A ReLU passes them on.

    Examples:
        >>> import fastentropy as fe
        >>> fe.IdleNeurons(neurons=8, never_on=(2, 5), never_off=(0,)).never_on
        (2, 5)
    """

    neurons: int
    never_on: tuple[int, ...]
    never_off: tuple[int, ...]


class IdleNeuronsBySite(dict[str, IdleNeurons]):
    """Map the name of each site to its idle neurons, in call order. `print` shows a table."""

    def __str__(self) -> str:
        """Return a table with a row for each site, and a line that sums up all sites."""
        head = ["site", "neurons", "never on", "never off"]
        numbers = [(site.neurons, len(site.never_on), len(site.never_off)) for site in self.values()]
        rows = [[name, *map(format_integer, row)] for name, row in zip(self, numbers, strict=True)]
        neurons, never_on, never_off = (sum(column) for column in zip((0, 0, 0), *numbers, strict=True))
        total = f"{plural(never_on + never_off, 'neuron')} of {format_integer(neurons)} never changed"
        return f"{format_table(head, rows)}\n\n{total} their state"


def find_idle_neurons(statistics: Statistics) -> IdleNeuronsBySite:
    """Find the neurons that never changed their state: those that were never on, and those that were never off.

    The states are those of the input of an activation. Neurons without any value are in neither list.

    Args:
        statistics: what a collector has counted.

    Returns:
        A dict from the name of each site to its `IdleNeurons`, in call order. `print` shows a table.

    Raises:
        TypeError: `statistics` are something else.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> counts = torch.tensor([[2, 0, 2], [4, 0, 0], [0, 1, 3]])
        >>> idle = fe.find_idle_neurons(fe.Statistics({"relu": fe.SiteStatistics("relu", counts)}))
        >>> idle["relu"]
        IdleNeurons(neurons=3, never_on=(1,), never_off=(2,))
        >>> print(idle)
        site  neurons  never on  never off
        ----  -------  --------  ---------
        relu        3         1          1
        <BLANKLINE>
        2 neurons of 3 never changed their state
    """
    check_statistics(statistics)
    found = IdleNeuronsBySite()
    for name, site in statistics.items():
        off, _, on = site.counts.unbind(1)
        never_off = (off == 0) & (on > 0)
        found[name] = IdleNeurons(site.neurons, *(tuple(each.nonzero().flatten().tolist()) for each in (site.dead, never_off)))
    return found
