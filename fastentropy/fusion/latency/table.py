"""What a network's latency would be without some of its activations: a table of measured stretches, and sums over it.

The optimum under a budget is that of depth compression (Kim et al., arXiv 2301.12187): dynamic programming over the places
where an activation may stay. Here it runs over all exchange rates of loss and time at once, through branches too.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """Parts [start, stop) of a section as one operator, for which the activations of all of them must be gone.

    modules are empty where the operator is equal to the parts; otherwise it approximates these modules.
    """

    start: int
    stop: int
    milliseconds: float
    sites: frozenset[str]
    modules: tuple[str, ...] = ()


class Part(NamedTuple):
    """What stands in a section, as it is: an operator, the activation of a site, or branches that are added.

    milliseconds are those of the operator, the activation or the addition.
    """

    milliseconds: float
    site: str = ""
    branches: tuple["Section", ...] = ()


class Section(NamedTuple):
    """Parts that run one after the other, and which stretches of them can stand as one operator."""

    parts: tuple[Part, ...]
    stretches: tuple[Stretch, ...]


#: Of more choices than this that no other beats, every nth is kept: where loss is proportional to time, each site doubles them.
MAX_CHOICES = 500


class Choice(NamedTuple):
    """Sites removed, what that loses, how long one call then takes, and which modules are approximated by one of them."""

    loss: float
    milliseconds: float
    removed: frozenset[str] = frozenset()
    projected: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one call of a network and of its parts, measured on one device for inputs of one size.

    original is the time of the dense network as given. sections are the chains that it would have without any activation, and
    rest is the time of what is in no chain.
    """

    original: float
    rest: float
    sections: tuple[Section, ...]

    @classmethod
    def from_parts(cls, original: float, fused: float, sections: Sequence[Section]) -> "LatencyTable":
        """The table of a dense network whose fastest form takes `fused`: what its parts take less is the rest.

        Where parts that are timed by themselves take more than all together, they are scaled to it.
        """
        parts = sum(_front(section, {})[0].milliseconds for section in sections)
        if parts <= fused:
            return cls(original, fused - parts, tuple(sections))
        return cls(original, 0.0, tuple(_scaled(section, fused / parts) for section in sections))

    def choices(self, losses: Mapping[str, float]) -> list[Choice]:
        """Every way to remove some of the sites in `losses` that no other beats in both loss and time, by rising loss.

        losses: what the removal of a site loses, 0 or more, added up over the sites. Thinned beyond `MAX_CHOICES`.
        """
        fronts = (_front(section, losses) for section in self.sections)
        return functools.reduce(_both, fronts, [Choice(0.0, self.rest)])

    def fastest(self, removed: Iterable[str]) -> Choice:
        """How the network without these sites runs fastest."""
        return self.choices(dict.fromkeys(removed, 0.0))[0]

    def candidates(self) -> list[frozenset[str]]:
        """The sets of sites whose removal may save time: those of each stretch, and each by itself."""
        sets = itertools.chain.from_iterable(map(_candidates, self.sections))
        return list(dict.fromkeys(sets))

    @property
    def sites(self) -> set[str]:
        """The sites of all sections."""
        return set().union(*self.candidates())

    def collapsed(self, modules: tuple[str, ...]) -> "LatencyTable":
        """The table of the network in which one operator approximates these modules for good."""
        return LatencyTable(self.original, self.rest, tuple(_collapsed(section, modules) for section in self.sections))

    def to_dict(self) -> dict[str, Any]:
        """The table in the types of JSON."""
        return {"original": self.original, "rest": self.rest, "sections": [_section_dict(each) for each in self.sections]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyTable":
        """The table that `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        sections = tuple(map(_section, values["sections"]))
        return cls(float(values["original"]), float(values["rest"]), sections)


def _front(section: Section, losses: Mapping[str, float]) -> list[Choice]:
    """The choices for a section that no other beats: dynamic programming over the places between its parts."""
    best = [[Choice(0.0, 0.0)]]
    for stop, part in enumerate(section.parts, 1):
        ways = _both(best[-1], _part_front(part, losses))
        for stretch in section.stretches:
            if stretch.stop == stop and stretch.sites <= losses.keys():
                loss, projected = sum(losses[site] for site in stretch.sites), (stretch.modules,) if stretch.modules else ()
                ways += _sums(best[stretch.start], [Choice(loss, stretch.milliseconds, stretch.sites, projected)])
        best.append(_unbeaten(ways))
    return best[-1]


def _part_front(part: Part, losses: Mapping[str, float]) -> list[Choice]:
    kept = [Choice(0.0, part.milliseconds)]
    if part.site in losses:
        return _unbeaten([*kept, Choice(losses[part.site], 0.0, frozenset([part.site]))])
    return functools.reduce(_both, (_front(branch, losses) for branch in part.branches), kept)


def _both(first: list[Choice], second: list[Choice]) -> list[Choice]:
    return _unbeaten(_sums(first, second))


def _sums(first: list[Choice], second: list[Choice]) -> list[Choice]:
    return [
        Choice(a.loss + b.loss, a.milliseconds + b.milliseconds, a.removed | b.removed, a.projected + b.projected)
        for a in first
        for b in second
    ]


def _unbeaten(choices: list[Choice]) -> list[Choice]:
    """Those that no other is as good as in both loss and time."""
    unbeaten: list[Choice] = []
    for choice in sorted(choices, key=lambda each: each[:2]):
        if not unbeaten or choice.milliseconds < unbeaten[-1].milliseconds:
            unbeaten.append(choice)
    if len(unbeaten) <= MAX_CHOICES:
        return unbeaten
    return unbeaten[: -1 : -(-len(unbeaten) // MAX_CHOICES)] + unbeaten[-1:]


def _scaled(section: Section, factor: float) -> Section:
    parts = tuple(
        Part(part.milliseconds * factor, part.site, tuple(_scaled(branch, factor) for branch in part.branches))
        for part in section.parts
    )
    stretches = tuple(stretch._replace(milliseconds=stretch.milliseconds * factor) for stretch in section.stretches)
    return Section(parts, stretches)


def _collapsed(section: Section, modules: tuple[str, ...]) -> Section:
    """A section with one part in the place of a stretch, and without the stretches that would cut through it."""
    branched = (
        part._replace(branches=tuple(_collapsed(branch, modules) for branch in part.branches)) for part in section.parts
    )
    section = section._replace(parts=tuple(branched))
    done = next((stretch for stretch in section.stretches if stretch.modules == modules), None)
    if done is None:
        return section
    shorter = done.stop - done.start - 1
    parts = (*section.parts[: done.start], Part(done.milliseconds), *section.parts[done.stop :])
    before = [s for s in section.stretches if s.stop <= done.start]
    around = [s._replace(stop=s.stop - shorter) for s in section.stretches if s.start <= done.start and done.stop <= s.stop]
    after = [s._replace(start=s.start - shorter, stop=s.stop - shorter) for s in section.stretches if done.stop <= s.start]
    return Section(parts, tuple(s for s in (*before, *around, *after) if s.modules != modules))


def _candidates(section: Section) -> Iterator[frozenset[str]]:
    yield from (stretch.sites for stretch in section.stretches if stretch.sites)
    for part in section.parts:
        if part.site:
            yield frozenset([part.site])
        for branch in part.branches:
            yield from _candidates(branch)


def without_slow_approximations(section: Section, gain: float) -> Section:
    """The section without approximations that are not faster, by a share, than the fastest exact form of the same parts."""
    exact = [stretch for stretch in section.stretches if not stretch.modules]

    def fastest_exact(start: int, stop: int, sites: frozenset[str]) -> float:
        inner = [s._replace(start=s.start - start, stop=s.stop - start) for s in exact if start <= s.start and s.stop <= stop]
        return _front(Section(section.parts[start:stop], tuple(inner)), dict.fromkeys(sites, 0.0))[0].milliseconds

    good = [
        s for s in section.stretches if s.modules and s.milliseconds <= (1 - gain) * fastest_exact(s.start, s.stop, s.sites)
    ]
    return section._replace(stretches=(*exact, *good))


def _section_dict(section: Section) -> dict[str, Any]:
    parts = [part._asdict() | {"branches": [_section_dict(branch) for branch in part.branches]} for part in section.parts]
    stretches = [stretch._asdict() | {"sites": sorted(stretch.sites)} for stretch in section.stretches]
    return {"parts": parts, "stretches": stretches}


def _section(values: Mapping[str, Any]) -> Section:
    parts = (Part(**part | {"branches": tuple(map(_section, part["branches"]))}) for part in values["parts"])
    stretches = (
        Stretch(**stretch | {"sites": frozenset(stretch["sites"]), "modules": tuple(stretch["modules"])})
        for stretch in values["stretches"]
    )
    return Section(tuple(parts), tuple(stretches))
