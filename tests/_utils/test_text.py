"""Texts for a terminal: narrow, aligned and accurate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastentropy._utils.text import format_count, format_share, format_table, plural, shorten_names

UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


@given(st.integers(0, 2**63 - 1))
def test_format_count_is_accurate_in_five_characters(count):
    text = format_count(count)
    assert len(text) <= 5
    number, _, unit = text.partition(" ")
    step = UNITS.get(unit, 1) * (0.1 if "." in number else 1)
    assert abs(float(number) * UNITS.get(unit, 1) - count) <= 0.501 * step
    assert float(number) < 1000
    assert (count < 1000) == (unit == "")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (9949, "9.9 k"), (9950, "10 k"), (999_500, "1.0 M"), (1_234_567_890, "1.2 G")],
)
def test_format_count_units(count, text):
    assert format_count(count) == text


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_format_share_rounds_to_none_or_all_only_if_exact(part, whole):
    part = min(part, whole)
    text = format_share(part / whole)
    assert len(text) <= 5
    assert (text == "0%") == (part == 0)
    assert (text == "100%") == (part == whole)
    assert abs(float(text.strip("<%")) / 100 - part / whole) <= 0.001


@given(st.lists(st.text("abc.", max_size=30), max_size=6), st.integers(1, 30))
def test_shortened_names_fit_and_short_ones_stay(names, length):
    shortened = shorten_names(names, length)
    for name, short in zip(names, shortened, strict=True):
        assert short == name if len(name) <= length else len(short) <= length and "…" in short


@pytest.mark.parametrize("place", ["{}" + "x" * 50, "x" * 50 + "{}", "x" * 25 + "{}" + "x" * 25, "x" * 10 + "{}" + "x" * 40])
def test_shortened_names_stay_distinct(place):
    shortened = shorten_names([place.format(f"<{number}>") for number in range(120)], 16)
    assert [number in short for number, short in zip(map(str, range(120)), shortened, strict=True)] == [True] * 120
    assert len(set(shortened)) == 120


def test_columns_are_aligned():
    table = format_table(["name", "count"], [["a", "1"], ["longer", "1000000"]])
    assert table.splitlines() == ["name      count", "------  -------", "a             1", "longer  1000000"]


def test_only_the_first_column_is_shortened():
    *_, row = format_table(["name", "kind"], [["n" * 50, "k" * 12]], left=2, width=30).splitlines()
    assert row == "nnnn…nnnnnnnnnnn  kkkkkkkkkkkk"


@pytest.mark.parametrize(("count", "text"), [(0, "0 sites"), (1, "1 site"), (4800, "4 800 sites")])
def test_plural(count, text):
    assert plural(count, "site") == text
