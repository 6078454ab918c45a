"""What the pages share: how one is written, and figures that are part of it."""

import io
import re
from collections.abc import Callable
from os import PathLike

import matplotlib.style
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastentropy._utils.files import replace_file
from fastentropy._utils.text import format_count, format_milliseconds, format_percent
from fastentropy.reporting.plots import INK, STYLE

#: Inches: the width of a figure of a page.
WIDTH = 7.6


def write_page(template: str, path: str | PathLike[str], **values: object) -> None:
    """Write one HTML page that needs nothing but itself. Text among the values is never markup."""
    environment = Environment(
        loader=PackageLoader("fastentropy.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=format_count, percent=format_percent, milliseconds=format_milliseconds)
    page = environment.get_template(template).render(**values)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def draw_svg(draw: Callable[[Axes], object], height: float, description: str) -> Markup:
    """A figure as an SVG element that takes its ink from the page, so that it reads on a light and on a dark ground.

    height is in inches; the description is what a screen reader says, and no other figure of the page has it.
    """
    buffer = io.StringIO()
    # Identifiers must be unique in a page: the salt tells its figures apart, and those of groups are used by nothing.
    with matplotlib.style.context(["default", STYLE, {"svg.hashsalt": description}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        no_metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'<g id="[\w.]+"', "<g", buffer.getvalue())
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
