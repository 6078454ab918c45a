"""A calibration in its folder: a checkpoint during the run; at the end statistics, a summary and a report."""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastentropy._utils.files import remove_leftovers, save_json
from fastentropy._utils.machine import describe_machine
from fastentropy.calibration.data.batching import ImageBatches, TextBatches
from fastentropy.calibration.data.corpus import Corpus, open_corpus
from fastentropy.calibration.engine import Calibration, Display, Outcome
from fastentropy.calibration.pretrained import DTYPES, MAX_LENGTH, Pretrained, load_pretrained
from fastentropy.calibration.ranks import Ranks
from fastentropy.calibration.report import write_report
from fastentropy.collector.collector import collect
from fastentropy.collector.statistics import Statistics

CHECKPOINT, STATISTICS, SUMMARY, PAGE = "checkpoint.safetensors", "statistics.safetensors", "summary.json", "report.html"


@dataclass(frozen=True)
class Options:
    """The options of `fastentropy calibrate`; see its --help. `max_length` None is the default for the model."""

    model: str
    data: str
    column: str | None = None
    batch_size: int = 8
    max_length: int | None = None
    packing: bool = False
    max_tokens: int | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    mask: str | None = "attention_mask"
    checkpoint_every: int = 8

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        for name in ("batch_size", "max_length", "max_tokens", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected 1 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    @property
    def default_folder(self) -> Path:
        """The folder, named after the model and the data, so that the same command continues an interrupted run."""
        names = [os.path.basename(os.path.abspath(source)).partition(":")[0] for source in (self.model, self.data)]
        return Path("runs") / re.sub(r"[^\w.-]+", "_", "-".join(["calibrate", *names]))


#: Makes the display of a run from two arguments: how much there is to do, in bytes of the corpus or in units, or None if it is
#: unknown; and the unit, tokens or images.
OpenDisplay = Callable[[int | None, str], contextlib.AbstractContextManager[Display]]


def run_calibration(
    options: Options, folder: Path, ranks: Ranks, open_display: OpenDisplay
) -> tuple[Statistics, dict[str, Any]]:
    """Begin a run in a new or empty folder, or continue the run that the folder holds. All ranks must call it.

    Returns:
        The statistics and the summary, which the folder holds at the end.

    Raises:
        ValueError: on rank 0, for an error that the user can fix.
        RemoteRankError: on the other ranks.
    """
    ranks.run_on_first(lambda: _check_folder(folder))
    corpus = ranks.run_on_all(lambda: open_corpus(options.data, column=options.column))
    pretrained = ranks.run_on_all(lambda: _load(options, corpus.kind, ranks))
    batches = ranks.run_on_all(lambda: _batches(options, pretrained))
    settings = _settings(options, pretrained, corpus)
    ranks.require_equal({**settings, "checkpoint every": options.checkpoint_every})
    with open_display(options.max_tokens or corpus.size, pretrained.unit) as display:
        calibration = Calibration(
            pretrained,
            corpus,
            batches,
            collect(pretrained.model, mask=options.mask),
            ranks,
            settings=settings,
            path=folder / CHECKPOINT,
            every=options.checkpoint_every,
            max_tokens=options.max_tokens,
            display=display,
        )
        outcome = calibration.run()
    summary = _summary(options, settings, outcome, ranks, pretrained, batches.notice)
    ranks.run_on_first(lambda: _finish(folder, outcome.statistics, summary))
    return outcome.statistics, summary


def _check_folder(folder: Path) -> None:
    """Raise ValueError if the folder holds something other than an interrupted run, or cannot be created."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; name a folder with --output")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{existing} cannot be written to; name another folder with --output")
    if existing != folder:
        return
    if not (folder / CHECKPOINT).exists() and any(not path.name.startswith(".tmp-") for path in folder.iterdir()):
        what = "a finished calibration" if (folder / SUMMARY).exists() else "other files"
        raise ValueError(f"{folder} holds {what}; name another folder with --output")
    remove_leftovers(folder)


def _load(options: Options, kind: str, ranks: Ranks) -> Pretrained:
    if options.device_map is not None and ranks.world_size > 1:
        raise ValueError("--device-map spreads the model of one process over all devices; leave it out under torchrun")
    pretrained = load_pretrained(
        options.model, kind=kind, dtype=options.dtype, device=torch.device(options.device), device_map=options.device_map
    )
    limit = pretrained.max_length
    if options.max_length is not None and limit is not None and options.max_length > limit:
        raise ValueError(f"--max-length {options.max_length} is more than {options.model} takes; set {limit} or less")
    if kind == "text" and options.mask is not None and not pretrained.takes_argument(options.mask):
        raise ValueError(f"--mask {options.mask}: no module of {options.model} takes an argument of that name")
    return pretrained


def _batches(options: Options, pretrained: Pretrained) -> TextBatches | ImageBatches:
    if pretrained.kind == "images":
        return ImageBatches(pretrained.processor, batch_size=options.batch_size)
    return TextBatches(
        pretrained.processor,
        batch_size=options.batch_size,
        max_length=_max_length(options, pretrained),
        packing=options.packing,
    )


def _max_length(options: Options, pretrained: Pretrained) -> int:
    return options.max_length or min(MAX_LENGTH, pretrained.max_length or MAX_LENGTH)


def _settings(options: Options, pretrained: Pretrained, corpus: Corpus) -> dict[str, Any]:
    """Return the settings that determine the counts; they must be the same when a run is continued."""
    of_text = {"max length": _max_length(options, pretrained), "packing": options.packing, "mask": options.mask}
    return {
        "model": pretrained.fingerprint(),
        "data": corpus.fingerprint,
        "batch size": options.batch_size,
        **(of_text if corpus.kind == "text" else {}),
        "max tokens": options.max_tokens,
        "dtype": str(pretrained.dtype).removeprefix("torch."),
    }


def _summary(
    options: Options, settings: dict[str, Any], outcome: Outcome, ranks: Ranks, pretrained: Pretrained, notice: str | None
) -> dict[str, Any]:
    neurons = sum(site.neurons for site in outcome.statistics.values())
    numbers = {name: value for name, value in asdict(outcome.tally).items() if name != "problems"}
    return {
        "model": options.model,
        "data": options.data,
        "settings": settings,
        "unit": pretrained.unit,
        **numbers,
        "problems": [problem._asdict() for problem in outcome.tally.problems],
        "notices": _notices(pretrained, options.mask, notice),
        "ranks": ranks.world_size,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "overhead": {"ratio": outcome.overhead, "samples": outcome.overhead_samples},
        "sync_seconds": outcome.sync_seconds,
        "counter_bytes": 24 * neurons,
        "layer_entropy": outcome.statistics.layer_entropy(),
        "machine": describe_machine(str(pretrained.device)),
    }


def _notices(pretrained: Pretrained, mask: str | None, notice: str | None) -> list[str]:
    """Return what a reader should know before relying on the figures."""
    notices = [] if notice is None else [notice]
    if pretrained.has_experts and pretrained.unit == "tokens" and mask is not None:
        notices.append(
            "The model is a mixture of experts, whose experts receive tokens in another order: padding may be counted there, "
            "and tokens left out. With --batch-size 1 there is no padding."
        )
    return notices


def _finish(folder: Path, statistics: Statistics, summary: dict[str, Any]) -> None:
    """Write the results, and remove the checkpoint last."""
    statistics.save(folder / STATISTICS)
    write_report(statistics, summary, folder / PAGE)
    save_json(summary, folder / SUMMARY)
    (folder / CHECKPOINT).unlink()
