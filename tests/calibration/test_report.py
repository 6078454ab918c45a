import dataclasses
import re

import pytest
import torch

import fastentropy as fe
from fastentropy.calibration.report import format_overhead, write_report
from fastentropy.collector.site_statistics import SiteStatistics


def statistics(sites=3, nan=0):
    generator = torch.Generator().manual_seed(0)
    return fe.Statistics(
        {
            f"model.layers.{site}.mlp.act_fn": SiteStatistics("silu", torch.randint(0, 1000, (8, 3), generator=generator), nan)
            for site in range(sites)
        }
    )


def summary(**changes):
    return {
        "model": "models/<tiny>",
        "data": "texts",
        "settings": {"model": "0123", "batch size": 8, "packing": False, "max tokens": None},
        "unit": "tokens",
        "batches": 7,
        "tokens": 1234567,
        "documents": 8901,
        "truncated": 0,
        "tokens_cut": 0,
        "problems": [],
        "notices": [],
        "ranks": 2,
        "seconds": 12.3,
        "tokens_per_second": 100_400.0,
        "overhead": {"ratio": 1.0123, "samples": 9},
        "sync_seconds": 0.0123,
        "counter_bytes": 576,
        "layer_entropy": {},
        "machine": {"device": "cpu", "torch": "2.14", "date": "2026-11-27"},
        **changes,
    }


@pytest.fixture
def page(tmp_path):
    def write(statistics=statistics(), **changes):  # noqa: B008
        write_report(statistics, summary(**changes), tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    return write


def words(page):
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_page_is_complete_and_self_contained(page):
    html = page()
    assert not re.search(r'(src|href)="(?!#|data:)|@import|url\((?!#)', html)
    for figure in (
        "1.2 M",
        "in 8 901 documents",
        "100 k",
        "on 2 processes",
        "1.012×",
        "576 bytes",
        "12.3 ms for each checkpoint",
    ):
        assert figure in words(html)
    for name, site in statistics().to_dict().items():
        assert name in html
        assert f"{site['entropy']:.3f}" in words(html)
    assert "models/&lt;tiny&gt;" in html
    assert "<tiny>" not in html


def test_notices_only_if_needed(page):
    assert 'class="notice"' not in page()
    html = page(statistics(nan=5), notices=["the tokenizer pads", "EOS is padded with"], truncated=3, tokens_cut=1234)
    for notice in (
        "EOS is padded with",
        "NaN occurred in model.layers.0.mlp.act_fn, ",
        "3 documents did not fit",
        "1.2 k tokens",
    ):
        assert notice in html


def test_notes_and_inferred_axes_are_shown(page):
    sites = dict(statistics())
    name = next(iter(sites))
    sites[name] = dataclasses.replace(sites[name], axis_is_inferred=True)
    text = words(page(fe.Statistics(sites, ["site 'other' was not counted"])))
    assert "Site 'other' was not counted." in text.replace("&#39;", "'")
    assert f"The channel axis of {name} is a default" in text


@pytest.mark.slow
def test_nan_in_many_activations(page):
    notice = re.search(r'class="notice">(.*?)</p>', page(statistics(40, nan=5)))[1]
    assert notice.startswith("NaN occurred in model.layers.0.mlp.act_fn, ")
    assert "37 more" in notice


def test_problems_are_listed(page):
    problem = {"path": "data/<a>.txt", "what": "a line is not UTF-8", "unit": "byte", "position": 17, "times": 12000}
    text = words(page(problems=[problem]))
    assert "12 000 documents or files could not be used" in text
    assert "data/&lt;a&gt;.txt a line is not UTF-8 12 k byte 17" in text


def test_overhead_not_measured(page):
    text = words(page(overhead={"ratio": None, "samples": 0}, tokens_per_second=0.4, unit="images"))
    assert "too few batches to measure it" in text
    assert "Images per second" in text
    assert format_overhead({"overhead": {"ratio": None, "samples": 0}}) == "not measured: too few batches"


def test_one_document_in_the_singular(page):
    assert "in 1 document" in words(page(tokens=1, documents=1, unit="images", ranks=1))


def sites_with(**on):
    """Return statistics of sites with one neuron each, of which some values of a hundred are on."""
    return fe.Statistics({name: SiteStatistics("relu", torch.tensor([[100 - count, 0, count]])) for name, count in on.items()})


def verdict(html):
    """Return the text of the last section of a page, and its code."""
    text, code = re.search(r"<h2>What follows</h2>(.*?)<pre>(.*?)</pre>\s*</main>", html, re.DOTALL).groups()
    return words(text), words(code)


def test_page_ends_with_nearly_linear_activations_and_the_next_step(page):
    html = page(sites_with(first=50, second=99, third=1))
    text, code = verdict(html)
    assert text.startswith("2 of 3 activations are nearly linear, with less than 0.1 bits: third, second. ")
    assert text.endswith("so no single one can be removed without a change.")
    assert "2 of 3 activations are nearly linear; the lowest entropy is 0.081 bits." in words(html)
    assert "fe.prune(" in code
    assert "linearize_neurons" not in code


def test_page_ends_with_idle_neurons(page):
    text, code = verdict(page(sites_with(first=50, second=40)))
    assert text.startswith("No activation is nearly linear: the lowest entropy is 0.971 bits.")
    assert "try those of lowest entropy first: second, first." in text
    text, code = verdict(page(sites_with(first=50, second=100)))
    assert "1 of 2 activations is nearly linear" in text
    assert "1 neuron of 2 never changed its state in this data." in text
    assert "fe.linearize_neurons(model, statistics)" in code
