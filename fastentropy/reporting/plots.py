"""The style of all plots, and the plot of entropies."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from fastentropy._utils.files import replace_file
from fastentropy._utils.text import shorten_names

INK = "#24292f"
GREY = "#8c959f"
#: Colours of Okabe and Ito's palette. They are distinct for every kind of colour vision, and readable on light and dark ground.
BLUE, ORANGE = "#0072b2", "#d55e00"
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.35,
    "grid.color": GREY,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastentropy",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
#: Sizes in inches: the height of a row, which shows a site (call of an activation), and the sum of the top and bottom margins.
ROW, MARGIN = 0.2, 0.9
#: The height of a bar relative to its row.
BAR = 0.72
#: The width of a figure for a phone, in inches.
PHONE_WIDTH = 3.7
#: Maximum number of characters of a site's name in a plot, and in one for a phone.
LABEL_LENGTH, PHONE_LABEL_LENGTH = 42, 18
#: Number of bins of the distribution of neuron entropies, which range from 0 to 1 bit.
BINS = 20
#: Colours of a bin, from "no neuron" to "all neurons". One hue gets darker, so the plot is readable without colour vision.
_SHADES = LinearSegmentedColormap.from_list("shares", ["#eef2f5", BLUE, "#00253b"])
#: The file formats of a figure, with metadata for `savefig`. No date is written, so the same figure gives the same bytes.
FORMATS: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


class EntropyFigure(Figure):
    """A figure that Jupyter displays even if pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_entropies(neuron_entropies: Mapping[str, Tensor], path: str | PathLike[str] | None = None) -> Figure:
    """Draw the layer entropy of each site next to the distribution of its neurons' entropies.

    Args:
        neuron_entropies: the entropy of each neuron in bits, `[neurons]`, by the name of the site.
        path: the file to save the figure to, with the suffix .png, .svg or .pdf. None does not save it.

    Returns:
        The figure.

    Raises:
        ValueError: the path has another suffix, or `neuron_entropies` is empty.
    """
    form = "" if path is None else figure_format(path)
    if not neuron_entropies:
        raise ValueError("there are no sites to plot")
    with matplotlib.style.context(["default", STYLE]):
        height = MARGIN + 0.2 + ROW * max(len(neuron_entropies), 5)
        figure = EntropyFigure(figsize=(10, height), layout=ConstrainedLayoutEngine(wspace=0.05))
        layers, neurons = figure.subplots(1, 2, sharey=True)
        draw_layer_entropy(layers, {name: float(entropies.mean()) for name, entropies in neuron_entropies.items()})
        draw_distributions(neurons, neuron_entropies, are_labelled=False)
        for axes, title in ((layers, "Layer entropy"), (neurons, "Entropies of its neurons")):
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        figure.draw_without_rendering()  # some parts of a figure take their style when they are first drawn
        figure.set_layout_engine("none")  # otherwise each drawing would move the axes a little
        if path is not None:
            replace_file(path, lambda file: figure.savefig(file, format=form, dpi=160, metadata=FORMATS[form]))
    return figure


def draw_layer_entropy(
    axes: Axes,
    layer_entropy: Mapping[str, float],
    colors: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Draw a horizontal bar for the entropy of each site, labelled with its bits.

    Args:
        axes: the axes to draw on.
        layer_entropy: the layer entropy of each site in bits, by name, from the top row to the bottom row.
        colors: the colour of the bar of some sites, by name. The other bars are blue.
        notes: a text that follows the bits of some sites, by name.
    """
    for row, (name, bits) in enumerate(layer_entropy.items()):
        axes.barh(row, bits, height=BAR, color=(colors or {}).get(name, BLUE))
        text = f"{bits:.3f}{(notes or {}).get(name, '')}"
        axes.annotate(text, (bits, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    label_sites(axes, list(layer_entropy))
    axes.set_xlim(0, 1)
    axes.set_xlabel("entropy (bits)")
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def label_sites(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows of a plot with the names of the sites, the first one at the top."""
    length = PHONE_LABEL_LENGTH if is_for_phone(axes) else LABEL_LENGTH
    axes.set_yticks(range(len(names)), shorten_names(names, length), fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def is_for_phone(axes: Axes) -> bool:
    """Return whether axes are part of a figure for a phone, which has less room for text."""
    figure = axes.get_figure(root=True)
    return figure is not None and figure.get_figwidth() <= PHONE_WIDTH


def draw_distributions(axes: Axes, neuron_entropies: Mapping[str, Tensor], are_labelled: bool = True) -> None:
    """Draw the distribution of the neuron entropies of each site as a strip of bins from 0 to 1 bit.

    A bin is darker if more neurons fall into it. A tick marks their mean, which is the layer entropy.

    Args:
        axes: the axes to draw on.
        neuron_entropies: the entropy of each neuron in bits, `[neurons]`, by the name of the site, from the top row down.
        are_labelled: whether to label the rows with the names of the sites.
    """
    edges = [edge / BINS for edge in range(BINS + 1)]
    for row, entropies in enumerate(neuron_entropies.values()):
        shares = torch.histc(entropies.clamp(0, 1), BINS, 0, 1) / len(entropies)  # rounding may leave a bit more than 1
        mesh = axes.pcolormesh(
            edges, [row - BAR / 2, row + BAR / 2], [shares.tolist()], cmap=_SHADES, norm=PowerNorm(0.5, 0, 1)
        )
    means = [float(entropies.mean()) for entropies in neuron_entropies.values()]
    axes.scatter(means, range(len(means)), s=60, marker="|", color=ORANGE, clip_on=False, zorder=3, label="mean")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, handlelength=1, handletextpad=0.2)
    axes.set_xlabel("entropy (bits)")
    if are_labelled:
        label_sites(axes, list(neuron_entropies))
    axes.tick_params(axis="y", length=0)
    colorbar = axes.figure.colorbar(
        mesh, ax=axes, label="share of neurons", aspect=20, pad=0.02, shrink=min(1, 15 / len(means)), anchor=(0, 1)
    )
    colorbar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0%", "5%", "20%", "50%", "100%"])


def figure_format(path: str | PathLike[str]) -> str:
    """Return the file format of a plot from the suffix of its path.

    Args:
        path: the path of the plot.

    Returns:
        "png", "svg" or "pdf", one of the keys of `FORMATS`.

    Raises:
        ValueError: the path has another suffix.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        suffixes = ", ".join(f".{each}" for each in FORMATS)
        raise ValueError(f"{path}: a plot is saved as {suffixes}; name a file with one of these suffixes")
    return form
