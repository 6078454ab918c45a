"""The plot of entropies: what is drawn, where it is written, and that nothing else changes."""

import itertools
import subprocess
import sys
import xml.etree.ElementTree

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastentropy.reporting.plots import BINS, plot_entropies

PNG = b"\x89PNG\r\n"


def make(sites, neurons=50, name="stage{}.relu"):
    generator = torch.Generator().manual_seed(sites)
    return {name.format(index): torch.rand(neurons, generator=generator, dtype=torch.float64) for index in range(sites)}


@pytest.mark.parametrize("sites", [1, 2, 17, pytest.param(60, marks=pytest.mark.slow)])
def test_bars_are_layer_entropies_in_call_order(sites):
    entropies = make(sites)
    layers = plot_entropies(entropies).axes[0]
    assert [bar.get_width() for bar in layers.patches] == pytest.approx([float(bits.mean()) for bits in entropies.values()])
    heights = [bar.get_window_extent().y0 for bar in layers.patches]
    assert heights == sorted(heights, reverse=True)
    assert [label.get_text() for label in layers.get_yticklabels()] == list(entropies)


def test_strips_are_distributions_of_neurons():
    entropies = make(5) | {"edges": torch.tensor([0, 0, 1, 1 + 1e-15], dtype=torch.float64)}
    neurons = plot_entropies(entropies).axes[1]
    for mesh, bits in zip(neurons.collections, entropies.values(), strict=False):
        expected = [0] * BINS
        for value in bits.tolist():
            expected[min(int(value * BINS), BINS - 1)] += 1 / len(bits)
        assert mesh.get_array().ravel().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sites", [1, 2, 17, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["{}.relu", "model.language_model.layers.{}.block_sparse_moe.experts.act_fn"])
def test_texts_neither_overlap_nor_leave_the_figure(sites, name):
    figure = plot_entropies(make(sites, name=name) | {"full": torch.ones(4, dtype=torch.float64)})
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(
    "suffix", [".svg", *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".png", ".pdf", ".PNG"))]
)
def test_suffix_selects_format_and_bytes_are_reproducible(tmp_path, suffix):
    path = tmp_path / f"entropies{suffix}"
    assert isinstance(plot_entropies(make(3), path), Figure)
    content = path.read_bytes()
    assert content.startswith({".svg": b"<?xml", ".pdf": b"%PDF-"}.get(suffix, PNG))
    assert list(tmp_path.iterdir()) == [path]
    plot_entropies(make(3), path)
    assert path.read_bytes() == content


@pytest.mark.slow
def test_saved_picture_is_the_returned_figure(tmp_path):
    figure = plot_entropies(make(4), tmp_path / "saved.png")
    figure.savefig(tmp_path / "drawn.png", dpi=160)
    assert (imread(tmp_path / "saved.png") == imread(tmp_path / "drawn.png")).all()


def test_names_are_not_interpreted(tmp_path):
    names = ["$x_1$.relu", "<b>&amp;.relu", "a\\b.relu"]
    plot_entropies(dict.fromkeys(names, torch.rand(3)), tmp_path / "names.svg")
    texts = set(xml.etree.ElementTree.parse(tmp_path / "names.svg").getroot().itertext())
    assert texts.issuperset(names)


@pytest.mark.parametrize("name", ["entropies", "entropies.gif", "png"])
def test_unknown_suffix_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=r"a plot is saved as \.png, \.svg, \.pdf; name a file with one of these suffixes$"):
        plot_entropies(make(2), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_plotting_without_sites_is_refused():
    with pytest.raises(ValueError, match="no sites to plot"):
        plot_entropies({})


@pytest.mark.slow
def test_matplotlib_settings_are_unchanged_and_ignored(tmp_path):
    plot_entropies(make(2), tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "xtick.color": "red"}):
        before = dict(matplotlib.rcParams)
        figure = plot_entropies(make(2), tmp_path / "set.png")
        assert dict(matplotlib.rcParams) == before
        figure.savefig(tmp_path / "later.png", dpi=160)
    plain = imread(tmp_path / "plain.png")
    assert (imread(tmp_path / "set.png") == plain).all()
    assert (imread(tmp_path / "later.png") == plain).all()


def test_notebook_can_display_the_figure():
    assert plot_entropies(make(2))._repr_png_().startswith(PNG)


@pytest.mark.slow
def test_plotting_leaves_pyplot_alone():
    code = (
        "import sys, torch, fastentropy.reporting.plots as plots; plots.plot_entropies({'relu': torch.rand(3)});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
