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
from fastentropy.reporting.plots import INK, PHONE_WIDTH, STYLE

#: The widths of a figure in inches, by the class of its `<svg>` element: on a screen, and on a phone.
WIDTHS = {"screen": 7.6, "phone": PHONE_WIDTH}


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
    """Draw a figure for a screen and for a phone, and return both as SVG elements. The style sheet of the page shows one.

    Text and axes take the text colour of the page, so they are readable on a light and on a dark ground.

    Args:
        draw: a function that draws the figure on the axes that it is given.
        height: the height of the figure in inches.
        description: the text for screen readers. It must be unique on the page, because element ids are derived from it.

    Returns:
        Two `<svg>` elements, to be inserted into a page without escaping.
    """
    return Markup("\n").join(_svg(draw, (width, height), description, kind) for kind, width in WIDTHS.items())


def _svg(draw: Callable[[Axes], object], size: tuple[float, float], description: str, kind: str) -> Markup:
    """Return a figure as an SVG element of the class `kind`. `size` is its width and its height; see `draw_svg`."""
    buffer = io.StringIO()
    # Element ids must be unique on a page. The salt makes the ids of different figures differ. The ids of groups are not
    # referred to, so they are removed below.
    with matplotlib.style.context(["default", STYLE, {"svg.hashsalt": f"{kind} {description}"}]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        no_metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'<g id="[\w.]+"', "<g", buffer.getvalue())
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return Markup(text.replace("<svg", f'<svg class="{kind}" role="img" aria-label="{escape(description)}"', 1))
