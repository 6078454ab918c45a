"""Sets of channels that are joined, against sets in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastentropy.fusion.neurons.links import Links

PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(PAIRS, st.sets(st.integers(0, 9), max_size=3))
def test_a_channel_stays_with_all_that_it_is_joined_to(pairs, kept):
    links, sets = Links(), {number: {number} for number in range(10)}
    numbers = links.add(10)
    for left, right in pairs:
        links.join(numbers[[left]], numbers[[right]])
        joined = sets[left] | sets[right]
        sets |= dict.fromkeys(joined, joined)
    links.keep(numbers[sorted(kept)])
    assert links.kept().tolist() == [not kept.isdisjoint(sets[number]) for number in range(10)]


def test_pairs_are_joined_at_once():
    links = Links()
    first, second = links.add(3), links.add(3)
    links.join(torch.cat([first, first]), torch.cat([second, second.roll(1)]))
    links.keep(second[:1])
    assert links.kept().all()
