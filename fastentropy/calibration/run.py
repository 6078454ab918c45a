"""Run a calibration in a folder.

During the run, the folder holds a checkpoint. At the end, it holds the statistics, a summary and a report instead.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastentropy._utils.errors import one_line
from fastentropy._utils.files import remove_leftovers, save_json
from fastentropy._utils.machine import describe_machine
from fastentropy.calibration.compiling import compile_layers
from fastentropy.calibration.data.batching import ImageBatches, TextBatches
from fastentropy.calibration.data.corpus import Corpus, open_corpus
from fastentropy.calibration.engine import Calibration, Display, Outcome
from fastentropy.calibration.pretrained import DTYPES, MAX_LENGTH, Pretrained, load_pretrained
from fastentropy.calibration.ranks import Ranks
from fastentropy.calibration.report import write_report
from fastentropy.collector.api import collect
from fastentropy.collector.statistics import Statistics
from fastentropy.reporting.history import check_form

#: The names of the files in the folder.
CHECKPOINT, STATISTICS, SUMMARY, PAGE = "checkpoint.safetensors", "statistics.safetensors", "summary.json", "report.html"

#: The values of a summary that the terminal and the report show, in the form that `check_form` describes.
_SUMMARY_FORM = {
    "model": str,
    "data": str,
    "settings": {str: object},
    "unit": str,
    "tokens": int,
    "documents": int,
    "truncated": int,
    "tokens_cut": int,
    "problems": [{"path": str, "what": str, "times": int}],
    "notices": [str],
    "ranks": int,
    "seconds": float,
    "tokens_per_second": float,
    "overhead": {"ratio": object, "samples": int},  # the ratio is None if it was not measured
    "sync_seconds": float,
    "counter_bytes": int,
    "machine": {"device": str, "torch": str, "date": str},
}


@dataclass(frozen=True)
class Options:
    """The options of the command `fastentropy calibrate`.

    Attributes:
        model: the folder of a transformers model, or its name on the Hugging Face Hub.
        data: the texts or images: a file, a folder, a glob pattern, or the name of a data set on the Hub.
        column: the column (or JSON key) that holds the documents; None for the default of `open_corpus`.
        batch_size: the rows of a batch.
        max_length: the largest number of tokens in a row; None for 512 or the limit of the model, whichever is lower.
        packing: whether rows are filled with several documents instead of padded.
        max_tokens: end the run after this many tokens (or images), counted over all ranks; None for all data.
        dtype: the dtype of the weights, a name in `DTYPES`.
        device: the device of PyTorch on which the model is placed.
        device_map: how the accelerate library spreads the model over several devices; None for `device` alone.
        mask: the name of the model's argument that holds the padding mask; None counts padding too.
        checkpoint_every: how many chunks (pieces of the data) each rank reads between two checkpoints.
        compile: whether the repeated layers of the model are compiled, and counted inside of their graphs.
    """

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
    compile: bool = False

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
        """The folder for a run that names none: runs/calibrate-MODEL-DATA-DIGEST.

        The name is the same each time, so repeating a command continues its interrupted run. The digest is that of the whole
        paths, since models are often in folders of the same name.
        """
        sources = [os.path.relpath(source) for source in (self.model, self.data)]
        names = [os.path.basename(os.path.abspath(source)).partition(":")[0] for source in sources]
        digest = hashlib.sha256("\0".join(sources).encode()).hexdigest()[:6]
        return Path("runs") / re.sub(r"[^\w.-]+", "_", "-".join(["calibrate", *names, digest]))


#: A function that opens the display of a run. Its arguments are the amount of work, and the unit of the data: "tokens" or
#: "images". The amount is `max_tokens` if that is set, otherwise the size of the corpus in bytes, or None if that is unknown.
OpenDisplay = Callable[[int | None, str], contextlib.AbstractContextManager[Display]]


def run_calibration(
    options: Options, folder: Path, ranks: Ranks, open_display: OpenDisplay
) -> tuple[Statistics, dict[str, Any]]:
    """Measure the activation statistics of a model over a corpus. All ranks must call it.

    Args:
        options: the options of the run.
        folder: a new or empty folder, or the folder of an interrupted run, which is then continued.
        ranks: the rank of this process and the number of ranks.
        open_display: opens the display of the progress.

    Returns:
        The statistics and the summary, as they are written to the folder.

    Raises:
        ValueError: on rank 0, for an error that the user can fix on any rank.
        RemoteRankError: on a rank that ends because of an error that is raised on another rank.
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


def read_outcome(folder: Path) -> tuple[Statistics, dict[str, Any]]:
    """Read what a finished calibration left in its folder.

    Args:
        folder: the folder of the run.

    Returns:
        The statistics and the summary, as `run_calibration` returned them.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or lacks a value that the report shows.
    """
    statistics, path = Statistics.load(folder / STATISTICS), folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        check_form(summary, _SUMMARY_FORM, "the summary")
        if summary["overhead"]["ratio"] is not None:
            check_form(summary["overhead"]["ratio"], float, "overhead.ratio")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    return statistics, summary


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished calibration."""
    return (folder / SUMMARY).is_file() and not (folder / CHECKPOINT).exists()


def _check_folder(folder: Path) -> None:
    """Check that a run can use the folder: raise ValueError if it holds other files or cannot be written to.

    A file is written for a moment, since permissions do not tell whether that works. Temporary files of a killed run are
    removed.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; name a folder with --output")
    if (
        existing == folder
        and not (folder / CHECKPOINT).exists()
        and any(not path.name.startswith(".tmp-") for path in folder.iterdir())
    ):
        if is_finished(folder):
            shown = f"show it with: fastentropy report {folder}"
            raise ValueError(f"{folder} holds a finished calibration; {shown}, or name another folder with --output")
        raise ValueError(f"{folder} holds other files; name another folder with --output")
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-0-", dir=existing) as probe:  # `remove_leftovers` knows the prefix
            Path(probe, "file").write_bytes(b"some")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}); name another folder with --output") from error
    remove_leftovers(folder)


def _load(options: Options, kind: str, ranks: Ranks) -> Pretrained:
    """Load the model, and check the options that depend on it.

    Args:
        options: the options of the run.
        kind: the kind of data in the corpus, "text" or "images".
        ranks: the rank of this process and the number of ranks.

    Raises:
        ValueError: the model cannot be loaded, or an option does not fit it.
    """
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
    if options.compile:
        compile_layers(pretrained.model)
    return pretrained


def _batches(options: Options, pretrained: Pretrained) -> TextBatches | ImageBatches:
    """Return the object that makes batches for the model."""
    if pretrained.kind == "images":
        return ImageBatches(pretrained.processor, batch_size=options.batch_size)
    return TextBatches(
        pretrained.processor,
        batch_size=options.batch_size,
        max_length=_max_length(options, pretrained),
        packing=options.packing,
    )


def _max_length(options: Options, pretrained: Pretrained) -> int:
    """Return the largest number of tokens in a row: the option, or the default for the model."""
    return options.max_length or min(MAX_LENGTH, pretrained.max_length or MAX_LENGTH)


def _settings(options: Options, pretrained: Pretrained, corpus: Corpus) -> dict[str, Any]:
    """Return the settings that determine the counts, by name. An interrupted run can be continued only with equal settings."""
    of_text = {"max length": _max_length(options, pretrained), "packing": options.packing, "mask": options.mask}
    return {
        "model": pretrained.fingerprint(),
        "data": corpus.fingerprint,
        "batch size": options.batch_size,
        **(of_text if corpus.kind == "text" else {}),
        "max tokens": options.max_tokens,
        "dtype": str(pretrained.dtype).removeprefix("torch."),
        "compile": options.compile,
    }


def _summary(
    options: Options, settings: dict[str, Any], outcome: Outcome, ranks: Ranks, pretrained: Pretrained, notice: str | None
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        options: the options of the run.
        settings: the settings that determine the counts, from `_settings`.
        outcome: the result of the run.
        ranks: the rank of this process and the number of ranks.
        pretrained: the model.
        notice: what the user should know about the padding, or None.
    """
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
        "notes": list(outcome.statistics.notes),
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
    """Return sentences about what limits the validity of the figures.

    Args:
        pretrained: the model.
        mask: the name of the model's argument that holds the padding mask, or None.
        notice: what the user should know about the padding, or None.
    """
    notices = [] if notice is None else [notice]
    if pretrained.has_experts and pretrained.unit == "tokens" and mask is not None:
        notices.append(
            "The model is a mixture of experts, whose experts receive tokens in another order: padding may be counted there, "
            "and tokens left out. With --batch-size 1 there is no padding."
        )
    return notices


def _finish(folder: Path, statistics: Statistics, summary: dict[str, Any]) -> None:
    """Write statistics, report and summary to the folder, then remove the checkpoint, which marks the run as unfinished."""
    statistics.save(folder / STATISTICS)
    write_report(statistics, summary, folder / PAGE)
    save_json(summary, folder / SUMMARY)
    (folder / CHECKPOINT).unlink()
