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
#: Of Okabe and Ito's palette: distinct for every kind of colour vision, and readable on light and dark ground.
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
#: Inches: the height of a site's row, and of the margins above and below the rows together.
ROW, MARGIN = 0.2, 0.9
#: The share of its row that a bar fills.
BAR = 0.72
#: Characters of a site's name that a plot has room for.
LABEL_LENGTH = 42
#: Bins in the distribution of neuron entropies, from 0 to 1 bit.
BINS = 20
#: From no neuron to all: one hue that gets darker, so that it can be read without telling colours apart.
_SHADES = LinearSegmentedColormap.from_list("shares", ["#eef2f5", BLUE, "#00253b"])
#: The formats of a figure, each with metadata to leave out, so that the same figure gives the same bytes.
FORMATS: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


class EntropyFigure(Figure):
    """A figure that a notebook displays even if pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_entropies(neuron_entropies: Mapping[str, Tensor], path: str | PathLike[str] | None = None) -> Figure:
    """Draw the entropy of each layer next to the distribution of its neurons' entropies.

    Args:
        neuron_entropies: the entropies of a site's neurons in bits, [neurons], by the name of the site.
        path: where to save the figure; the suffix, one of `FORMATS`, is its format. None to not save it.

    Returns:
        The figure.

    Raises:
        ValueError: for another suffix, and if there are no sites.
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
    """Draw a bar with its bits for each site, in call order from the top. `colors` and `notes` apply to some sites by name."""
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
    """Label a row for each site, the first at the top."""
    axes.set_yticks(range(len(names)), shorten_names(names, LABEL_LENGTH), fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def draw_distributions(axes: Axes, neuron_entropies: Mapping[str, Tensor], are_labelled: bool = True) -> None:
    """Draw a strip for each site, darker where more of its neurons are, with a tick at their mean, the layer entropy."""
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
    """Return the format that the suffix of a path names. Raises ValueError if it is none of `FORMATS`."""
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        suffixes = ", ".join(f".{each}" for each in FORMATS)
        raise ValueError(f"{path}: a plot is saved as {suffixes}; name a file with one of these suffixes")
    return form
