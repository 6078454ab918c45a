"""Predict the latency of a network without some of its activations, from a table of measured stretches.

The optimum under a budget is that of depth compression (Kim et al., arXiv 2301.12187): dynamic programming over the positions
at which an activation may stay. Here it covers all exchange rates of loss and time at once, and branches too.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """Parts of a section that run as one operator once the activations among them are removed.

    Attributes:
        start: index of the first part.
        stop: index behind the last part.
        milliseconds: time of the one operator.
        sites: the activations among the parts.
        modules: the modules that the operator approximates; empty if it is exact.
    """

    start: int
    stop: int
    milliseconds: float
    sites: frozenset[str]
    modules: tuple[str, ...] = ()


class Part(NamedTuple):
    """One part of a section: an operator, the activation of a site, or branches that are added.

    Attributes:
        milliseconds: time of the operator, of the activation or of the addition.
        site: name of the site of an activation, otherwise empty.
        branches: what is added, otherwise empty.
    """

    milliseconds: float
    site: str = ""
    branches: tuple["Section", ...] = ()


class Section(NamedTuple):
    """Parts that run one after the other, and the stretches of them that can run as one operator."""

    parts: tuple[Part, ...]
    stretches: tuple[Stretch, ...]


#: The most choices that are kept; of more, every nth is kept. Where loss is proportional to time, each site doubles them.
MAX_CHOICES = 500


class Choice(NamedTuple):
    """A set of sites to remove.

    Attributes:
        loss: sum of the losses of these sites.
        milliseconds: predicted time of one call without them.
        removed: names of the sites.
        projected: for each operator that is an approximation, the modules that it approximates.
    """

    loss: float
    milliseconds: float
    removed: frozenset[str] = frozenset()
    projected: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one call of a network and of its parts, measured on one device for inputs of one size.

    Attributes:
        original: time of the dense network as given, in milliseconds.
        rest: time of everything that is in no section, in milliseconds.
        sections: the chains that the network would have without any activation.

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
        """Make the table of a dense network from the times of its parts.

        Parts that take longer one by one than all of them together are scaled down to the time of the whole.

        Args:
            original: time of the network as given, in milliseconds.
            fused: time of its fastest form, in milliseconds.
            sections: the measured sections.

        Returns:
            The table, whose `rest` is the difference between `fused` and the time of the sections.
        """
        parts = sum(_choices_of_section(section, {})[0].milliseconds for section in sections)
        if parts <= fused:
            return cls(original, fused - parts, tuple(sections))
        return cls(original, 0.0, tuple(_scaled(section, fused / parts) for section in sections))

    def choices(self, losses: Mapping[str, float]) -> list[Choice]:
        """Return the sets of sites that no other set beats in both loss and time.

        Args:
            losses: for each site that may be removed, what its removal loses, 0 or more. Losses add up.

        Returns:
            The choices by rising loss; of more than `MAX_CHOICES` some are left out.
        """
        fronts = (_choices_of_section(section, losses) for section in self.sections)
        return functools.reduce(_combine, fronts, [Choice(0.0, self.rest)])

    def fastest(self, removed: Iterable[str]) -> Choice:
        """Return the fastest way to run the network without some sites.

        Args:
            removed: names of the sites whose activations are removed.

        Returns:
            The choice with the least time; its loss is 0.
        """
        return self.choices(dict.fromkeys(removed, 0.0))[0]

    def candidates(self) -> list[frozenset[str]]:
        """Return the sets of sites whose removal may save time: those of each stretch, and each site alone."""
        sets = itertools.chain.from_iterable(map(_candidates, self.sections))
        return list(dict.fromkeys(sets))

    @property
    def sites(self) -> set[str]:
        """Return the sites of all sections."""
        return set().union(*self.candidates())

    def collapsed(self, modules: tuple[str, ...]) -> "LatencyTable":
        """Return the table of the network in which one operator permanently replaces some modules.

        Args:
            modules: the `modules` of one of the stretches.

        Returns:
            A table without the stretches that would cut through these modules.
        """
        return LatencyTable(self.original, self.rest, tuple(_collapsed(section, modules) for section in self.sections))

    def to_dict(self) -> dict[str, Any]:
        """Return the table in the types of JSON."""
        return {"original": self.original, "rest": self.rest, "sections": [_section_to_dict(each) for each in self.sections]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """Return the table that `to_dict` wrote.

        Args:
            values: what `to_dict` returned, possibly written to JSON and read back.

        Returns:
            A table equal to the one that was written.

        Raises:
            KeyError: an entry is missing.
            TypeError: an entry has another type.
            ValueError: a number cannot be read.
        """
        sections = tuple(map(_section_from_dict, values["sections"]))
        return cls(float(values["original"]), float(values["rest"]), sections)


def _choices_of_section(section: Section, losses: Mapping[str, float]) -> list[Choice]:
    """Return the choices for a section that no other beats, by dynamic programming over the positions between its parts."""
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
    kept = [Choice(0.0, part.milliseconds)]
    if part.site in losses:
        return _pareto_front([*kept, Choice(losses[part.site], 0.0, frozenset([part.site]))])
    return functools.reduce(_combine, (_choices_of_section(branch, losses) for branch in part.branches), kept)


def _combine(first: list[Choice], second: list[Choice]) -> list[Choice]:
    return _pareto_front(_pairwise_sums(first, second))


def _pairwise_sums(first: list[Choice], second: list[Choice]) -> list[Choice]:
    return [
        Choice(a.loss + b.loss, a.milliseconds + b.milliseconds, a.removed | b.removed, a.projected + b.projected)
        for a in first
        for b in second
    ]


def _pareto_front(choices: list[Choice]) -> list[Choice]:
    """Return the choices that no other equals or beats in both loss and time."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda each: each[:2]):
        if not front or choice.milliseconds < front[-1].milliseconds:
            front.append(choice)
    if len(front) <= MAX_CHOICES:
        return front
    every = -(-len(front) // MAX_CHOICES)
    return front[:-1:every] + front[-1:]


def _scaled(section: Section, factor: float) -> Section:
    parts = tuple(
        Part(part.milliseconds * factor, part.site, tuple(_scaled(branch, factor) for branch in part.branches))
        for part in section.parts
    )
    stretches = tuple(stretch._replace(milliseconds=stretch.milliseconds * factor) for stretch in section.stretches)
    return Section(parts, stretches)


def _collapsed(section: Section, modules: tuple[str, ...]) -> Section:
    """Return a section with one part in the place of a stretch, without the stretches that would cut through this part."""
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
    yield from (stretch.sites for stretch in section.stretches if stretch.sites)
    for part in section.parts:
        if part.site:
            yield frozenset([part.site])
        for branch in part.branches:
            yield from _candidates(branch)


def without_slow_approximations(section: Section, gain: float) -> Section:
    """Drop the approximations of a section that save less than a share `gain` of the time of the fastest exact form."""
    exact = [stretch for stretch in section.stretches if not stretch.modules]

    def fastest_exact(start: int, stop: int, sites: frozenset[str]) -> float:
        inner = [s._replace(start=s.start - start, stop=s.stop - start) for s in exact if start <= s.start and s.stop <= stop]
        return _choices_of_section(Section(section.parts[start:stop], tuple(inner)), dict.fromkeys(sites, 0.0))[0].milliseconds

    fast = [
        s for s in section.stretches if s.modules and s.milliseconds <= (1 - gain) * fastest_exact(s.start, s.stop, s.sites)
    ]
    return section._replace(stretches=(*exact, *fast))


def _section_to_dict(section: Section) -> dict[str, Any]:
    parts = [part._asdict() | {"branches": [_section_to_dict(branch) for branch in part.branches]} for part in section.parts]
    stretches = [stretch._asdict() | {"sites": sorted(stretch.sites)} for stretch in section.stretches]
    return {"parts": parts, "stretches": stretches}


def _section_from_dict(values: Mapping[str, Any]) -> Section:
    parts = (Part(**part | {"branches": tuple(map(_section_from_dict, part["branches"]))}) for part in values["parts"])
    stretches = (
        Stretch(**stretch | {"sites": frozenset(stretch["sites"]), "modules": tuple(stretch["modules"])})
        for stretch in values["stretches"]
    )
    return Section(tuple(parts), tuple(stretches))
