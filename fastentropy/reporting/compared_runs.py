"""The pruning runs of a comparison: their labels and options, and the published results that are shown next to them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastentropy._utils.text import shorten_names
from fastentropy.reporting.history import RunHistory

#: Maximum number of characters of a run's label in a legend, and of a label or an option's value in a terminal table.
LEGEND_LENGTH, COLUMN_LENGTH = 36, 16
#: The options that are shown first, in this order. All other options follow them.
OPTIONS = ["model", "criterion", "collapse", "target_speedup", "seed", "max_drop", "max_removed", "per_step", "epochs"]
#: Values of options that a history lacks if it is older than the option.
DEFAULTS = {"criterion": "entropy", "zeros_together": False, "compile": False}
#: The model that a recipe uses if none is named, by recipe.
DEFAULT_MODELS = {"cifar10": "resnet18"}


@dataclass(frozen=True)
class Published:
    """The results of a paper for one model.

    Attributes:
        model: the name of the model.
        sites: the number of activation calls in the model.
        tests: the test accuracy in percent, by the number of activations that were removed.
    """

    model: str
    sites: int
    tests: tuple[tuple[int, float], ...]


SOURCE = "EASIER, arXiv 2404.18949, Table 5"
#: Published results. The key is the model's name in the recipe cifar10 in lower case, with letters and digits only. The paper's
#: VGG-16 has batch norm.
PUBLISHED = {
    "resnet18": Published(
        "ResNet-18", 17, ((0, 92.47), (2, 92.82), (7, 92.40), (8, 92.10), (9, 90.35), (11, 86.53), (16, 77.74))
    ),
    "swint": Published("Swin-T", 12, ((0, 91.66), (7, 91.41), (8, 90.83))),
    "mobilenetv2": Published("MobileNetV2", 35, ((0, 93.65), (12, 93.16), (15, 92.77), (17, 92.05), (29, 88.43))),
    "vgg16": Published("VGG-16", 15, ((0, 93.50), (8, 93.61), (10, 93.04), (14, 90.38))),
}
PUBLISHED["vgg16bn"] = PUBLISHED["vgg16"]


def label_runs(paths: Sequence[Path]) -> list[str]:
    """Return a label for each path: its shortest trailing part that no other path ends with."""
    return [next(end for end in _ends(path) if sum(end in _ends(other) for other in paths) == 1) for path in paths]


def _ends(path: Path) -> list[str]:
    return [str(Path(*path.parts[start:])) for start in reversed(range(len(path.parts)))]


class Runs:
    """The histories of several runs, and the values that the page, the picture and the tables show.

    Attributes:
        histories: the parsed `history.json` of each run, by label.
        labels: the labels of the runs, in the order in which they are shown.
        recipe: the name of the recipe that all runs share.
        started: the runs with at least one finished step, by label.
        finished: the runs that are complete, by label. A run is complete once it has chosen the step that it keeps.
        on_different_machines: whether the runs differ in their device or in their version of PyTorch.
        options: all options as text: name of the option → label of the run → value.
        differing: the entries of `options` whose value differs between runs.
        common: the value of each option that is the same in all runs, by name, except the values "none" and "no".
        short: `differing`, with each value shortened to at most `COLUMN_LENGTH` characters.
    """

    def __init__(self, histories: Mapping[str, Mapping[str, Any]]) -> None:
        """Read the histories.

        Args:
            histories: the parsed `history.json` of each run, by label. `check_history` must accept each of them.

        Raises:
            ValueError: the runs have different recipes, or no run has a finished step.
        """
        self.histories, self.labels, self.recipe = histories, list(histories), _common_recipe(histories)
        self.started = {label: RunHistory(history) for label, history in histories.items() if history["steps"]}
        if not self.started:
            raise ValueError(f"{', '.join(self.labels)}: no step is finished yet; there is nothing to compare")
        self.finished = {label: run for label, run in self.started.items() if run.history["kept_step"] is not None}
        self.on_different_machines = len(distinct_machines(self.started)) > 1
        self.options = _options(histories, self.recipe)
        self.differing = {name: texts for name, texts in self.options.items() if len(set(texts.values())) > 1}
        same = {name: next(iter(texts.values())) for name, texts in self.options.items() if name not in self.differing}
        self.common = {name: text for name, text in same.items() if text not in ("none", "no")}
        self.short = {name: _shorten(texts, COLUMN_LENGTH) for name, texts in self.differing.items()}

    @property
    def published(self) -> list[Published]:
        """Return the published results for the models of these runs, without repetitions."""
        models = self.options["model"].values() if self.recipe == "cifar10" else ()
        names = ("".join(filter(str.isalnum, model)).lower() for model in models)
        return list(dict.fromkeys(PUBLISHED[name] for name in names if name in PUBLISHED))

    @property
    def entries(self) -> dict[str, str]:
        """Return the legend text of each run, by label: its label, its differing options, and "unfinished" if it is."""
        entries = _shorten(dict(zip(self.labels, self.labels, strict=True)), LEGEND_LENGTH)
        for label, name in entries.items():
            notes = [f"{option} {texts[label]}" for option, texts in self.short.items()]
            notes += [] if label in self.finished else ["unfinished"]
            entries[label] = f"{name} ({', '.join(notes)})" if notes else name
        return entries


def distinct_machines(runs: Mapping[str, RunHistory]) -> set[tuple[str, str]]:
    """Return the distinct pairs (device, version of PyTorch) on which the latencies of the runs were measured."""
    return {(run.history["machine"]["device"], run.history["machine"]["torch"]) for run in runs.values()}


def _shorten(texts: Mapping[str, str], length: int) -> dict[str, str]:
    return dict(zip(texts, shorten_names(list(texts.values()), length), strict=True))


def _common_recipe(histories: Mapping[str, Mapping[str, Any]]) -> str:
    (first, history), *others = histories.items()
    for label, other in others:
        if other["recipe"] != history["recipe"]:
            raise ValueError(
                f"{first} is a run of the recipe {history['recipe']!r} and {label} of {other['recipe']!r}; "
                "accuracies on different data cannot be compared"
            )
    return str(history["recipe"])


def _options(histories: Mapping[str, Mapping[str, Any]], recipe: str) -> dict[str, dict[str, str]]:
    """Return all options of the runs, and the seed, as text: name of the option → label of the run → value."""
    defaults = {**DEFAULTS, "model": DEFAULT_MODELS.get(recipe)}
    stored = {label: {**history["options"], "seed": history["seed"]} for label, history in histories.items()}
    given = {label: {name: value for name, value in options.items() if value is not None} for label, options in stored.items()}
    names = dict.fromkeys(itertools.chain(OPTIONS, *stored.values()))
    return {
        name: {label: format_option({**defaults, **options}.get(name)) for label, options in given.items()} for name in names
    }


def format_option(value: object) -> str:
    """Return the value of an option as text. None and an empty list become "none", and booleans "yes" or "no"."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
