"""HTML pages: rendering of a template, and drawing of figures as inline SVG."""

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
    """Render a template to a self-contained HTML file.

    Args:
        template: the file name of a Jinja template in fastentropy/reporting/templates.
        path: the HTML file to write.
        values: the variables of the template, by name. Strings are escaped, except `Markup`.
    """
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
    """Draw a figure and return it as an SVG element.

    Text and axes take the text colour of the page, so they are readable on a light and on a dark ground.

    Args:
        draw: a function that draws the figure on the axes that it is given.
        height: the height of the figure in inches.
        description: the text for screen readers. It must be unique on the page, because element ids are derived from it.

    Returns:
        The `<svg>` element, to be inserted into a page without escaping.
    """
    buffer = io.StringIO()
    # Element ids must be unique on a page. The salt makes the ids of different figures differ. The ids of groups are not
    # referred to, so they are removed below.
    with matplotlib.style.context(["default", STYLE, {"svg.hashsalt": description}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        no_metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'<g id="[\w.]+"', "<g", buffer.getvalue())
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
