"""Write the figures of a step to JSON lines, TensorBoard or Weights & Biases."""

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics

#: A function that is given the figures of a step, by key, and the number of the step.
Writer = Callable[[dict[str, float], int], object]

#: The figures that are written of each site, as `Statistics.to_dict` calls them.
_FIGURES = ("entropy", "dead", "always_on")
#: The key under which Weights & Biases is given the number of the step.
_WANDB_STEP = "monitor/step"


def figures_of(statistics: Statistics) -> dict[str, float]:
    """Return the figures to write, with keys such as "dead/layer1.0.relu". A viewer that groups by "/" has a group for each."""
    # All sites together, because a call of an operator takes as long as its work on thousands of neurons.
    neurons = SiteStatistics("all", torch.cat([site.counts for site in statistics.values()]))
    rows = torch.stack([neurons.entropy(), *(row.double() for row in (neurons.dead, neurons.always_on, neurons.observed))])
    figures = dict[str, list[float]]()
    for name, part in zip(statistics, torch.split(rows, [site.neurons for site in statistics.values()], dim=1), strict=True):
        entropy, dead, always_on, observed = part.sum(1).tolist()
        figures[name] = [entropy / part.shape[1], dead / max(observed, 1), always_on / max(observed, 1)]
    return {f"{figure}/{name}": figures[name][index] for index, figure in enumerate(_FIGURES) for name in figures}


def json_lines_writer(path: str | PathLike[str]) -> Writer:
    """Return a writer for `EntropyMonitor` that appends a line of JSON to a file for each step that is measured.

    Args:
        path: the file. It is created at the first step that is written, together with its folder. Lines that it has are kept.

    Returns:
        The writer. A line holds `step`, the number of the step, and the figures of all sites by key.

    Examples:
        >>> import fastentropy as fe
        >>> write = fe.json_lines_writer("runs/digits.jsonl")
        >>> write({"entropy/relu": 0.75, "dead/relu": 0.125, "always_on/relu": 0.0}, 50)
        >>> print(open("runs/digits.jsonl").read(), end="")
        {"step": 50, "entropy/relu": 0.75, "dead/relu": 0.125, "always_on/relu": 0.0}
    """
    file = Path(path)

    def write(figures: Mapping[str, float], step: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **figures}) + "\n")

    return write


def tensorboard_writer(target: str | PathLike[str] | Any) -> Writer:
    """Return a writer for `EntropyMonitor` that adds a scalar to TensorBoard for each figure.

    TensorBoard shows three sections, `entropy`, `dead` and `always_on`, with a chart for each site.

    Args:
        target: a folder for an event file, which is created at the first step that is written; or a `SummaryWriter` of yours.

    Returns:
        The writer. It flushes the event file after each step.

    Examples:
        >>> import os
        >>> import fastentropy as fe
        >>> write = fe.tensorboard_writer("runs/digits")
        >>> write({"entropy/relu": 0.75, "dead/relu": 0.125, "always_on/relu": 0.0}, 50)
        >>> len(os.listdir("runs/digits"))
        1
    """
    events = None if isinstance(target, str | PathLike) else target

    def write(figures: Mapping[str, float], step: int) -> None:
        nonlocal events
        if events is None:
            events = _summary_writer(target)
        for key, value in figures.items():
            events.add_scalar(key, value, step)
        events.flush()

    return write


def wandb_writer(run: Any = None) -> Writer:
    """Return a writer for `EntropyMonitor` that logs the figures to a run of Weights & Biases.

    The figures have an x-axis of their own, `monitor/step`, so whatever else the run logs is not disturbed.

    Args:
        run: a run, as `wandb.init` returns it. With None it is the run that is active at the first step that is written.

    Returns:
        The writer.

    Examples:
        >>> import fastentropy as fe
        >>> write = fe.wandb_writer()  # looks for a run at the first step
    """
    prepared = None

    def write(figures: Mapping[str, float], step: int) -> None:
        nonlocal prepared
        if prepared is None:
            prepared = _prepared(run)
        prepared.log({_WANDB_STEP: step, **figures})

    return write


def _summary_writer(folder: str | PathLike[str]) -> Any:
    """Return a new SummaryWriter for a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("fe.tensorboard_writer() needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder))


def _prepared(run: Any) -> Any:
    """Return a run, or the active one for None, whose figures of activations are drawn over the steps of the monitor."""
    if run is None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("fe.wandb_writer() needs wandb: pip install wandb") from error
        run = wandb.run
        if run is None:
            raise RuntimeError("fe.wandb_writer() found no active run: call wandb.init() before the first step")
    run.define_metric(_WANDB_STEP, hidden=True)
    for figure in _FIGURES:
        run.define_metric(f"{figure}/*", step_metric=_WANDB_STEP)
    return run
