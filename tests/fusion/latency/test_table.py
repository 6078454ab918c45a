"""The latency table against an oracle that tries every division of its sections."""

import itertools
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fastentropy.fusion.latency.table import (
    MAX_CHOICES,
    Choice,
    LatencyTable,
    Part,
    Section,
    Stretch,
    without_slow_approximations,
)

MILLISECONDS = st.integers(0, 20).map(float)


@st.composite
def tables(draw):
    """Draw a table of a few sections with branches; times are small integers, so that sums are exact and ties happen."""
    names = (f"site{index}" for index in itertools.count())
    sections = tuple(draw(sections_of(names, depth=1)) for _ in range(draw(st.integers(1, 2))))
    return LatencyTable(100.0, 7.0, sections)


@st.composite
def sections_of(draw, names, depth):
    """Draw a section whose sites take the next names; at a depth of 1 it may have branches."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["operator", "site", "branches"][: 3 if depth else 2]))
        branches = tuple(draw(sections_of(names, 0)) for _ in range(2)) if kind == "branches" else ()
        parts.append(Part(draw(MILLISECONDS), next(names) if kind == "site" else "", branches))
    ends = itertools.combinations(range(len(parts) + 1), 2)
    chosen = [pair for pair in ends if draw(st.booleans())]
    stretches = [
        Stretch(start, stop, draw(MILLISECONDS), sites_of(parts[start:stop]), draw(st.sampled_from([(), (f"m{start}{stop}",)])))
        for start, stop in chosen
    ]
    return Section(tuple(parts), tuple(stretches))


def sites_of(parts):
    """Return the sites of some parts and of their branches."""
    own = {part.site for part in parts if part.site}
    return frozenset(own.union(*(sites_of(branch.parts) for part in parts for branch in part.branches)))


def milliseconds(section, removed):
    """Return the least time of a section without some sites, by trying every division: the oracle."""

    def part_time(part):
        inner = sum(milliseconds(branch, removed) for branch in part.branches)
        return inner + (0 if part.site in removed else part.milliseconds)

    def from_position(start):
        if start == len(section.parts):
            return 0
        times = [part_time(section.parts[start]) + from_position(start + 1)]
        times += [s.milliseconds + from_position(s.stop) for s in section.stretches if s.start == start and s.sites <= removed]
        return min(times)

    return from_position(0)


def total(table, removed):
    return table.rest + sum(milliseconds(section, removed) for section in table.sections)


@pytest.mark.slow
@given(tables(), st.randoms(use_true_random=False))
def test_choices_are_the_pareto_front(table, random):
    sites = sorted(frozenset().union(*(sites_of(section.parts) for section in table.sections)))[:8]
    losses = {site: float(random.randrange(8)) for site in sites}
    subsets = [frozenset(each) for n in range(len(sites) + 1) for each in itertools.combinations(sites, n)]
    tried = {(sum(losses[site] for site in each), total(table, each)) for each in subsets}
    best = {(a, b) for a, b in tried if not any((c <= a and d <= b) and (c, d) != (a, b) for c, d in tried)}
    choices = table.choices(losses)
    assert {(choice.loss, choice.milliseconds) for choice in choices} == best
    assert [choice.loss for choice in choices] == sorted(choice.loss for choice in choices)
    for choice in choices:
        assert total(table, choice.removed) <= choice.milliseconds
        assert sum(losses[site] for site in choice.removed) == choice.loss


@given(tables(), st.randoms(use_true_random=False))
def test_fastest_is_the_best_division(table, random):
    sites = frozenset().union(*(sites_of(section.parts) for section in table.sections))
    removed = frozenset(site for site in sites if random.random() < 0.5)
    assert table.fastest(removed).milliseconds == total(table, removed)
    assert table.fastest(()).milliseconds == total(table, frozenset())


@pytest.mark.slow
@given(tables())
def test_a_table_survives_json(table):
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@pytest.mark.slow
@given(tables())
def test_candidates_are_stretches_and_single_sites(table):
    candidates = table.candidates()
    assert len(set(candidates)) == len(candidates)
    sites = frozenset().union(*(sites_of(section.parts) for section in table.sections))
    assert {frozenset([site]) for site in sites} <= set(candidates)
    assert {s.sites for section in table.sections for s in section.stretches if s.sites} <= set(candidates)


CHAIN = (Part(3.0), Part(1.0, "a"), Part(3.0), Part(1.0, "b"), Part(3.0))


@pytest.mark.parametrize(("milliseconds", "kept"), [(3.0, True), (3.9, True), (3.95, False), (4.0, False), (9.0, False)])
def test_only_clearly_faster_approximations_are_kept(milliseconds, kept):
    exact = Stretch(0, 3, 4.0, frozenset("a"))
    approximate = Stretch(0, 3, milliseconds, frozenset("a"), ("conv1", "conv2"))
    expected = (exact, approximate) if kept else (exact,)
    assert without_slow_approximations(Section(CHAIN, (approximate, exact)), 0.02).stretches == expected


def test_a_choice_names_the_approximated_modules():
    projected = Stretch(2, 5, 1.0, frozenset("b"), ("conv2", "conv3"))
    table = LatencyTable(11.0, 0.0, (Section(CHAIN, (projected,)),))
    assert table.fastest("a") == Choice(0.0, 10.0, frozenset("a"))
    assert table.fastest("ab").projected == (("conv2", "conv3"),)
    assert table.fastest("ab").milliseconds == 4.0


def test_parts_add_up_to_the_measured_whole():
    section = Section((*CHAIN, Part(2.0, "", (Section(CHAIN, ()),))), (Stretch(0, 3, 4.0, frozenset("a")),))
    loose = LatencyTable.from_parts(50.0, 40.0, [section])
    assert (loose.rest, loose.fastest(()).milliseconds) == (16.0, 40.0)
    tight = LatencyTable.from_parts(50.0, 12.0, [section])
    assert (tight.rest, tight.fastest(()).milliseconds) == (0.0, pytest.approx(12.0))
    saved = 3.0 + 1.0  # by the stretch, and by a itself in the branch
    assert tight.fastest("a").milliseconds == pytest.approx((24.0 - saved) / 2)


def test_a_collapsed_stretch_is_one_part():
    """The second stretch would cut through the first one, the third one contains it, and the last one lies beside it."""
    stretches = (
        Stretch(0, 3, 2.0, frozenset("a"), ("conv1", "conv2")),
        Stretch(2, 5, 0.5, frozenset("b"), ("conv2", "conv3")),
        Stretch(0, 5, 1.5, frozenset("ab"), ("conv1", "conv2", "conv3")),
        Stretch(4, 5, 2.5, frozenset()),
    )
    table = LatencyTable(11.0, 0.0, (Section(CHAIN, stretches),)).collapsed(("conv1", "conv2"))
    assert table.fastest("a").milliseconds == 2.0 + 1.0 + 2.5
    assert table.fastest("a").projected == ()
    assert table.fastest("ab") == Choice(0.0, 1.5, frozenset("ab"), (("conv1", "conv2", "conv3"),))
    (section,) = table.sections
    assert [stretch[:3] for stretch in section.stretches] == [(0, 3, 1.5), (2, 3, 2.5)]
    inside = LatencyTable(11.0, 0.0, (Section((Part(1.0, "", (Section(CHAIN, stretches),)),), ()),))
    assert inside.collapsed(("conv1", "conv2")).fastest("a").milliseconds == 1.0 + 5.5


@pytest.mark.slow
def test_choices_are_thinned_if_none_beats_another():
    """If the loss is proportional to the time, none of the 2^40 subsets beats another."""
    parts = tuple(Part(float(2**index), f"s{index}") for index in range(40))
    table = LatencyTable(1.0, 0.0, (Section(parts, ()),))
    choices = table.choices({part.site: part.milliseconds for part in parts})
    assert 100 < len(choices) <= MAX_CHOICES + 1
    assert choices[0].removed == frozenset()
    assert choices[-1].removed == {part.site for part in parts}
