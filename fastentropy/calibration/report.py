"""Write the report of a calibration run: one HTML page, made from the statistics and the summary of the run."""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

from fastentropy._utils.text import format_count, format_integer, plural
from fastentropy.collector.statistics import Statistics
from fastentropy.reporting.pages import draw_svg, write_page
from fastentropy.reporting.plots import MARGIN, ROW, draw_distributions, draw_layer_entropy

#: How many activations a notice names at most.
MAX_NAMED = 3


def write_report(statistics: Statistics, summary: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write the report as one HTML page that needs no other files.

    Args:
        statistics: the counts of the run, by activation.
        summary: the content of the run's `summary.json`.
        path: the file to create or to replace.
    """
    entropies = {name: site.entropy() for name, site in statistics.items()}
    bits = statistics.layer_entropy()
    height = MARGIN + ROW * max(len(entropies), 5)
    write_page(
        "calibration.html.j2",
        path,
        summary=summary,
        sites=statistics.to_dict(),
        headline=_headline(bits),
        numbers=_numbers(statistics, bits, summary),
        notices=_notices(statistics, summary),
        words=_words(summary),
        bars=draw_svg(
            partial(draw_layer_entropy, layer_entropy=bits),
            height,
            "Bars: the entropy of each activation",
        ),
        strips=draw_svg(
            partial(draw_distributions, neuron_entropies=entropies),
            height,
            "Strips: how the entropies of neurons are distributed",
        ),
    )


def format_overhead(summary: Mapping[str, Any]) -> str:
    """Describe the overhead of counting the activations in one phrase. `summary` is the content of the run's `summary.json`."""
    overhead = summary["overhead"]
    if overhead["ratio"] is None:
        return "not measured: too few batches"
    return f"{overhead['ratio']:.3f} of the time without it, median of {plural(overhead['samples'], 'batch', 'batches')}"


def _headline(bits: Mapping[str, float]) -> str:
    """Return the sentence at the top of the report. `bits` holds the entropy of each activation."""
    lowest = min(bits, key=bits.__getitem__)
    return f"{plural(len(bits), 'activation')}; the lowest entropy is {bits[lowest]:.3f} bits, of {lowest}."


def _numbers(statistics: Statistics, bits: Mapping[str, float], summary: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the main figures of the report: by title, the figure and a remark about it."""
    neurons = sum(site.neurons for site in statistics.values())
    overhead = summary["overhead"]["ratio"]
    return {
        "Mean layer entropy": (f"{sum(bits.values()) / len(bits):.3f} bits", f"of {format_integer(neurons)} neurons"),
        f"{summary['unit'].capitalize()} counted": (
            format_count(summary["tokens"]),
            f"in {plural(summary['documents'], 'document')}",
        ),
        f"{summary['unit'].capitalize()} per second": (
            format_count(round(summary["tokens_per_second"])),
            f"on {plural(summary['ranks'], 'process', 'processes')}",
        ),
        "Time while collecting": (
            "–" if overhead is None else f"{overhead:.3f}×",
            "relative to the same batches without" if overhead else "too few batches to measure it",
        ),
    }


def _notices(statistics: Statistics, summary: Mapping[str, Any]) -> list[str]:
    """Return sentences about what limits the validity of the figures: notices, NaN, truncated documents, unusable files."""
    found = [f"{notice[:1].upper()}{notice[1:]}." for notice in summary["notices"]]
    found += [f"{note[:1].upper()}{note[1:]}." for note in statistics.notes]
    if inferred := [name for name, site in statistics.items() if site.axis_is_inferred]:
        found.append(f"The channel axis of {_named(inferred)} is a default, because nothing told where the neurons lie.")
    if nan := [name for name, site in statistics.items() if site.nan]:
        found.append(f"NaN occurred in {_named(nan)}: such values count in no state.")
    if summary["truncated"]:
        found.append(
            f"{plural(summary['truncated'], 'document')} did not fit into a row: {format_count(summary['tokens_cut'])} tokens "
            "were cut off. With --packing, none are."
        )
    if summary["problems"]:
        times = sum(problem["times"] for problem in summary["problems"])
        found.append(f"{plural(times, 'document or file', 'documents or files')} could not be used; the last table lists them.")
    return found


def _named(names: Sequence[str]) -> str:
    """Return the first `MAX_NAMED` names as text, and the number of the others."""
    others = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{others}"


def _words(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts about the conditions of the run, by title."""
    settings = ", ".join(f"{name} {value}" for name, value in summary["settings"].items() if value not in (None, False))
    machine = summary["machine"]
    return {
        "Settings": settings,
        "Time": f"{summary['seconds']:.0f} seconds, all parts of the run included",
        "Sum over ranks": f"{1e3 * summary['sync_seconds']:.1f} ms for each checkpoint",
        "Counters": f"{format_integer(summary['counter_bytes'])} bytes of counts: 24 per neuron, held twice during the run",
        "Collecting": format_overhead(summary),
        "Machine": f"{machine['device']}, PyTorch {machine['torch']}",
    }
