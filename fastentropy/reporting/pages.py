"""HTML pages: rendering a template, and figures as inline SVG."""

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
from fastentropy._utils.text import format_count, format_milliseconds, format_percent, plural
from fastentropy.reporting.plots import INK, STYLE

#: The width of a figure on a page in inches.
WIDTH = 7.6


def write_page(template: str, path: str | PathLike[str], **values: object) -> None:
    """Render a template to a self-contained HTML page. Texts among the values are escaped."""
    environment = Environment(
        loader=PackageLoader("fastentropy.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=format_count, percent=format_percent, milliseconds=format_milliseconds, plural=plural)
    page = environment.get_template(template).render(**values)
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def draw_svg(draw: Callable[[Axes], object], height: float, description: str) -> Markup:
    """Return a figure as an SVG element in the text colour of the page, so that it is readable on light and dark ground.

    Args:
        draw: draws the figure on axes.
        height: the height in inches.
        description: the text for screen readers, which must be unique on the page.
    """
    buffer = io.StringIO()
    # Identifiers must be unique on a page. The salt makes those of each figure differ; those of groups are unused.
    with matplotlib.style.context(["default", STYLE, {"svg.hashsalt": description}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        no_metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'<g id="[\w.]+"', "<g", buffer.getvalue())
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
