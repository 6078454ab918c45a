"""Predict the latency of a network without some of its activations, from a table of measured times.

A site is a call of an activation. A section is a chain: a portion of the network that would be linear without its
activations. A stretch is a series of parts of a section that can run as one operator once the activations among them are
removed.

Depth compression (Kim et al., arXiv 2301.12187) finds the best sites to remove under a time budget, by dynamic programming
over the positions at which an activation may stay. The search here returns the best choices for all budgets at once, and
handles branches too.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """A series of parts of a section that run as one operator once the activations among them are removed.

    Attributes:
        start: index of the first part.
        stop: index after the last part.
        milliseconds: time of the one operator.
        sites: names of the sites among the parts, including those inside branches.
        modules: paths of the modules that the operator approximates; empty if the operator is exact.
    """

    start: int
    stop: int
    milliseconds: float
    sites: frozenset[str]
    modules: tuple[str, ...] = ()


class Part(NamedTuple):
    """One part of a section: an operator, an activation, or branches whose outputs are added.

    Attributes:
        milliseconds: time of the operator, of the activation, or of the addition without the branches.
        site: name of the site if the part is an activation; otherwise empty.
        branches: the branches if the part is a sum; otherwise empty.
    """

    milliseconds: float
    site: str = ""
    branches: tuple["Section", ...] = ()


class Section(NamedTuple):
    """Parts of a network that run one after the other, and the stretches of them that can run as one operator.

    Attributes:
        parts: the parts, in the order in which they run.
        stretches: the stretches, which may overlap.
    """

    parts: tuple[Part, ...]
    stretches: tuple[Stretch, ...]


#: The largest number of choices that are kept; if there are more, every nth is kept. Without a limit, each further site can
#: double their number.
MAX_CHOICES = 500


class Choice(NamedTuple):
    """A set of sites to remove.

    Attributes:
        loss: sum of the losses of the removed sites.
        milliseconds: predicted time of one call without their activations.
        removed: names of the removed sites.
        projected: one entry per operator that is only an approximation: the paths of the modules that it approximates.
    """

    loss: float
    milliseconds: float
    removed: frozenset[str] = frozenset()
    projected: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class LatencyTable:
    """The time of one call of a network and of each of its parts, measured on one device for inputs of one size.

    Attributes:
        original: time of the network as given, with all activations, in milliseconds.
        rest: time of everything that is in no section, in milliseconds.
        sections: the portions of the network that would be linear without their activations.

    Examples:
        >>> from fastentropy.fusion.latency import LatencyTable
        >>> from fastentropy.fusion.latency.table import Part, Section, Stretch
        >>> parts = (Part(3.0), Part(1.0, site="relu"), Part(3.0))
        >>> merged = Stretch(0, 3, 2.0, frozenset({"relu"}))
        >>> table = LatencyTable(8.0, 1.0, (Section(parts, (merged,)),))
        >>> table.fastest([]).milliseconds, table.fastest(["relu"]).milliseconds
        (8.0, 3.0)
    """

    original: float
    rest: float
    sections: tuple[Section, ...]

    @classmethod
    def from_parts(cls, original: float, fused: float, sections: Sequence[Section]) -> "LatencyTable":
        """Make the table of a network from the times of its sections.

        If the sections, timed one by one, take longer than the whole network, their times are scaled down to the time of the
        network.

        Args:
            original: time of the network as given, in milliseconds.
            fused: time of its fastest form with all activations, in milliseconds.
            sections: the measured sections.

        Returns:
            The table. Its `rest` is the difference between `fused` and the time of the sections.
        """
        parts = sum(_choices_of_section(section, {})[0].milliseconds for section in sections)
        if parts <= fused:
            return cls(original, fused - parts, tuple(sections))
        return cls(original, 0.0, tuple(_scaled(section, fused / parts) for section in sections))

    def choices(self, losses: Mapping[str, float]) -> list[Choice]:
        """Return the Pareto-optimal sets of sites to remove.

        No other set is better in loss or time without being worse in the other.

        Args:
            losses: the loss of removing each site that may be removed, 0 or more, by name of the site. The loss of a set is
                the sum of the losses of its sites.

        Returns:
            The choices by rising loss and falling time. If there are more than `MAX_CHOICES`, some are left out.
        """
        fronts = (_choices_of_section(section, losses) for section in self.sections)
        return functools.reduce(_combine, fronts, [Choice(0.0, self.rest)])

    def fastest(self, removed: Iterable[str]) -> Choice:
        """Return the fastest way to run the network if the activations of some sites may be removed.

        Args:
            removed: names of these sites.

        Returns:
            The choice with the smallest time. Its loss is 0. An activation may be kept if its removal saves no time.
        """
        return self.choices(dict.fromkeys(removed, 0.0))[0]

    def candidates(self) -> list[frozenset[str]]:
        """Return the sets of sites whose removal may save time: the sites of each stretch together, and each site alone."""
        sets = itertools.chain.from_iterable(map(_candidates, self.sections))
        return list(dict.fromkeys(sets))

    @property
    def sites(self) -> set[str]:
        """Return the names of the sites in all sections."""
        return set().union(*self.candidates())

    def collapsed(self, modules: tuple[str, ...]) -> "LatencyTable":
        """Return the table of the network after one operator has permanently replaced some modules.

        Args:
            modules: paths of the modules, which must be the `modules` of one of the stretches.

        Returns:
            The table in which that stretch is a single part. Stretches that contain only some of its parts are left out.
        """
        return LatencyTable(self.original, self.rest, tuple(_collapsed(section, modules) for section in self.sections))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a dict that can be written as JSON.

        Returns:
            The fields by name. Sections, parts and stretches are dicts too.
        """
        return {"original": self.original, "rest": self.rest, "sections": [_section_to_dict(each) for each in self.sections]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """Make a table from the dict that `to_dict` returned.

        Args:
            values: the dict, which may have been written to JSON and read back.

        Returns:
            A table equal to the original one.

        Raises:
            KeyError: an entry is missing.
            TypeError: an entry has another type.
            ValueError: a number cannot be read.
        """
        sections = tuple(map(_section_from_dict, values["sections"]))
        return cls(float(values["original"]), float(values["rest"]), sections)


def _choices_of_section(section: Section, losses: Mapping[str, float]) -> list[Choice]:
    """Return the Pareto-optimal choices for a section, by dynamic programming over the positions between its parts.

    `losses` is as in `LatencyTable.choices`.
    """
    best = [[Choice(0.0, 0.0)]]
    for stop, part in enumerate(section.parts, 1):
        choices = _combine(best[-1], _choices_of_part(part, losses))
        for stretch in section.stretches:
            if stretch.stop == stop and stretch.sites <= losses.keys():
                loss, projected = sum(losses[site] for site in stretch.sites), (stretch.modules,) if stretch.modules else ()
                choices += _pairwise_sums(best[stretch.start], [Choice(loss, stretch.milliseconds, stretch.sites, projected)])
        best.append(_pareto_front(choices))
    return best[-1]


def _choices_of_part(part: Part, losses: Mapping[str, float]) -> list[Choice]:
    """Return the Pareto-optimal choices for one part: an activation is kept or removed, choices of branches are combined."""
    kept = [Choice(0.0, part.milliseconds)]
    if part.site in losses:
        return _pareto_front([*kept, Choice(losses[part.site], 0.0, frozenset([part.site]))])
    return functools.reduce(_combine, (_choices_of_section(branch, losses) for branch in part.branches), kept)


def _combine(first: list[Choice], second: list[Choice]) -> list[Choice]:
    """Return the Pareto-optimal choices for two things that run one after the other, given the choices for each."""
    return _pareto_front(_pairwise_sums(first, second))


def _pairwise_sums(first: list[Choice], second: list[Choice]) -> list[Choice]:
    """Return every combination of a choice from each list; their losses and times add up."""
    return [
        Choice(a.loss + b.loss, a.milliseconds + b.milliseconds, a.removed | b.removed, a.projected + b.projected)
        for a in first
        for b in second
    ]


def _pareto_front(choices: list[Choice]) -> list[Choice]:
    """Return the Pareto-optimal choices by rising loss and falling time, at most about `MAX_CHOICES` of them.

    Of choices with equal loss and time, one is returned.
    """
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda each: each[:2]):
        if not front or choice.milliseconds < front[-1].milliseconds:
            front.append(choice)
    if len(front) <= MAX_CHOICES:
        return front
    every = -(-len(front) // MAX_CHOICES)
    return front[:-1:every] + front[-1:]


def _scaled(section: Section, factor: float) -> Section:
    """Return a section with all times multiplied by a factor."""
    parts = tuple(
        Part(part.milliseconds * factor, part.site, tuple(_scaled(branch, factor) for branch in part.branches))
        for part in section.parts
    )
    stretches = tuple(stretch._replace(milliseconds=stretch.milliseconds * factor) for stretch in section.stretches)
    return Section(parts, stretches)


def _collapsed(section: Section, modules: tuple[str, ...]) -> Section:
    """Return a section in which the stretch that approximates some modules is a single part.

    Stretches that contain only some of its parts are left out. `modules` are the paths of the modules. A section without such
    a stretch stays as it is, except inside its branches.
    """
    branched = (
        part._replace(branches=tuple(_collapsed(branch, modules) for branch in part.branches)) for part in section.parts
    )
    section = section._replace(parts=tuple(branched))
    replaced = next((stretch for stretch in section.stretches if stretch.modules == modules), None)
    if replaced is None:
        return section
    shorter = replaced.stop - replaced.start - 1
    parts = (*section.parts[: replaced.start], Part(replaced.milliseconds), *section.parts[replaced.stop :])
    before = [s for s in section.stretches if s.stop <= replaced.start]
    around = [
        s._replace(stop=s.stop - shorter) for s in section.stretches if s.start <= replaced.start and replaced.stop <= s.stop
    ]
    after = [s._replace(start=s.start - shorter, stop=s.stop - shorter) for s in section.stretches if replaced.stop <= s.start]
    return Section(parts, tuple(s for s in (*before, *around, *after) if s.modules != modules))


def _candidates(section: Section) -> Iterator[frozenset[str]]:
    """Yield the sets of sites of one section; see `LatencyTable.candidates`. A set may come twice."""
    yield from (stretch.sites for stretch in section.stretches if stretch.sites)
    for part in section.parts:
        if part.site:
            yield frozenset([part.site])
        for branch in part.branches:
            yield from _candidates(branch)


def without_slow_approximations(section: Section, gain: float) -> Section:
    """Return a section without the approximating stretches that are not clearly faster than an exact form.

    Args:
        section: the section.
        gain: the share of the time of the fastest exact form of the same parts that an approximation must save, 0 to 1.
    """
    exact = [stretch for stretch in section.stretches if not stretch.modules]

    def fastest_exact(start: int, stop: int, sites: frozenset[str]) -> float:
        inner = [s._replace(start=s.start - start, stop=s.stop - start) for s in exact if start <= s.start and s.stop <= stop]
        return _choices_of_section(Section(section.parts[start:stop], tuple(inner)), dict.fromkeys(sites, 0.0))[0].milliseconds

    fast = [
        s for s in section.stretches if s.modules and s.milliseconds <= (1 - gain) * fastest_exact(s.start, s.stop, s.sites)
    ]
    return section._replace(stretches=(*exact, *fast))


def _section_to_dict(section: Section) -> dict[str, Any]:
    """Return a section as a dict that can be written as JSON."""
    parts = [part._asdict() | {"branches": [_section_to_dict(branch) for branch in part.branches]} for part in section.parts]
    stretches = [stretch._asdict() | {"sites": sorted(stretch.sites)} for stretch in section.stretches]
    return {"parts": parts, "stretches": stretches}


def _section_from_dict(values: Mapping[str, Any]) -> Section:
    """Make a section from the dict that `_section_to_dict` returned."""
    parts = (Part(**part | {"branches": tuple(map(_section_from_dict, part["branches"]))}) for part in values["parts"])
    stretches = (
        Stretch(**stretch | {"sites": frozenset(stretch["sites"]), "modules": tuple(stretch["modules"])})
        for stretch in values["stretches"]
    )
    return Section(tuple(parts), tuple(stretches))
