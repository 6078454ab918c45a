"""A cursor reads any ranges of rows."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy.calibration.data.cursor import Cursor


@settings(max_examples=200)
@given(data=st.data(), sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_cursor_reads_any_ranges_in_turn(data, sizes):
    def open_source(source, start):
        yield from range(start, sizes[source])

    cursor = Cursor(open_source)
    readers = []
    for _ in range(data.draw(st.integers(1, 5))):
        source, start = data.draw(st.integers(0, len(sizes) - 1)), data.draw(st.integers(0, 12))
        stop = data.draw(st.integers(start, 13))
        expected = [(row, row) for row in range(start, min(stop, sizes[source]))]
        readers.append((cursor.rows(source, start, stop), expected, []))
    for which in data.draw(st.lists(st.sampled_from(range(len(readers))), max_size=60)):
        reader, _, found = readers[which]
        found.extend(itertools.islice(reader, 1))
    for reader, expected, found in readers:
        assert [*found, *reader] == expected
