"""Figures of pages are drawn for a screen and for a phone."""

import re

import pytest

from fastentropy.reporting.pages import WIDTHS, draw_svg
from fastentropy.reporting.plots import LABEL_LENGTH, PHONE_LABEL_LENGTH, label_sites

NAMES = [f"model.encoder.layers.{layer}.intermediate.dense.activation" for layer in range(3)]


def drawn():
    """Return a figure by the class of its element: for a screen, and for a phone."""
    parts = draw_svg(lambda axes: label_sites(axes, NAMES), 2, "names").split("</svg>")[:-1]
    return {re.search(r'class="(\w+)"', part)[1]: part for part in parts}


def test_each_size_has_its_width_in_points():
    widths = {kind: float(re.search(r'<svg [^>]*width="([\d.]+)pt"', svg)[1]) for kind, svg in drawn().items()}
    assert widths == pytest.approx({kind: 72 * width for kind, width in WIDTHS.items()})


def test_names_are_shorter_for_a_phone():
    lengths = {kind: {len(text) for text in re.findall(r">([^<>]*…[^<>]*)</text>", svg)} for kind, svg in drawn().items()}
    assert lengths == {"screen": {LABEL_LENGTH}, "phone": {PHONE_LABEL_LENGTH}}


def test_elements_of_both_sizes_have_ids_of_their_own():
    ids = re.findall(r'id="([^"]+)"', "".join(drawn().values()))
    assert len(ids) == len(set(ids)) > 0
