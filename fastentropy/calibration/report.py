"""Write the report of a calibration run: one HTML page, made from the statistics and the summary of the run."""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

from fastentropy._utils.text import format_count, format_integer, plural
from fastentropy.collector.idle_neurons import find_idle_neurons
from fastentropy.collector.statistics import Statistics
from fastentropy.reporting.pages import draw_svg, write_page
from fastentropy.reporting.plots import MARGIN, ROW, draw_distributions, draw_layer_entropy

#: How many activations a sentence names at most.
MAX_NAMED = 3
#: An activation is called nearly linear below this layer entropy in bits. It is that of a neuron with 1.3 % of its values on.
NEARLY_LINEAR = 0.1


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
        verdict=_verdict(statistics, bits),
        code=_next_step(statistics),
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
    linear = sum(entropy < NEARLY_LINEAR for entropy in bits.values())
    which = f"{linear} of {plural(len(bits), 'activation')}" if linear else f"None of {plural(len(bits), 'activation')}"
    return f"{which} {'are' if linear > 1 else 'is'} nearly linear; the lowest entropy is {min(bits.values()):.3f} bits."


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


def _verdict(statistics: Statistics, bits: Mapping[str, float]) -> list[str]:
    """Return sentences on which activations and neurons may be removed. `bits` holds the entropy of each activation."""
    ranked = sorted(bits, key=bits.__getitem__)
    linear = [name for name in ranked if bits[name] < NEARLY_LINEAR]
    if linear:
        are = "is" if len(linear) == 1 else "are"
        verdict = (
            f"{len(linear)} of {plural(len(bits), 'activation')} {are} nearly linear, with less than {NEARLY_LINEAR} bits: "
            f"{_named(linear)}. Removing them, with fine-tuning, is likely to cost little."
        )
    else:
        verdict = (
            f"No activation is nearly linear: the lowest entropy is {bits[ranked[0]]:.3f} bits. Removing any of them changes "
            f"what the model computes. With fine-tuning, try those of lowest entropy first: {_named(ranked)}."
        )
    idle, neurons = _idle_neurons(statistics), sum(site.neurons for site in statistics.values())
    if not idle:
        return [verdict, "Every neuron changed its state in this data, so no single one can be removed without a change."]
    return [
        verdict,
        f"{plural(idle, 'neuron')} of {format_integer(neurons)} never changed {'its' if idle == 1 else 'their'} state in this "
        "data. There the activation can be replaced by what it computes, without fine-tuning.",
    ]


def _next_step(statistics: Statistics) -> str:
    """Return the code that goes on from the statistics."""
    lines = ["import fastentropy as fe", "", 'statistics = fe.Statistics.load("statistics.safetensors")  # beside this page']
    if _idle_neurons(statistics):
        lines.append("states = fe.linearize_neurons(model, statistics)")
    arguments = ("model, train=train, evaluate=evaluate,", "calibrate=calibrate, example_inputs=inputs,")
    return "\n".join([*lines, "result = fe.prune(", *(f"    {part}" for part in arguments), ")"])


def _idle_neurons(statistics: Statistics) -> int:
    """Return how many neurons never changed their state."""
    return sum(len(site.never_on) + len(site.never_off) for site in find_idle_neurons(statistics).values())


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
