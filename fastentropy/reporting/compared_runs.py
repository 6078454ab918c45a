"""Several runs of one recipe, labelled, and the published figures beside them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastentropy._utils.text import shorten_names
from fastentropy.reporting.history import RunHistory

#: The characters of a run's label in a legend, and of a label and of an option in a column of a terminal.
LEGEND_LENGTH, COLUMN_LENGTH = 36, 16


#: The order in which options are told; others follow.
OPTIONS = ["model", "criterion", "collapse", "target_speedup", "seed", "max_drop", "max_removed", "per_step", "epochs"]


#: What options are that a history does not tell, because they are newer than it or were left to the recipe.
UNTOLD = {"criterion": "entropy", "zeros_together": False, "compile": False}


UNTOLD_MODELS = {"cifar10": "resnet18"}


@dataclass(frozen=True)
class Published:
    """What a paper reports of a model: its test accuracy before and after the removal of some of its activations."""

    model: str
    sites: int
    removed: int
    dense: float
    pruned: float


SOURCE = "EASIER, arXiv 2404.18949, Table 5"


#: By the letters and digits of the model's name in the recipe cifar10. The paper's VGG-16 has batch norm.
PUBLISHED = {
    "resnet18": Published("ResNet-18", 17, 8, 0.9247, 0.9210),
    "swint": Published("Swin-T", 12, 8, 0.9166, 0.9083),
    "mobilenetv2": Published("MobileNetV2", 35, 15, 0.9365, 0.9277),
    "vgg16": Published("VGG-16", 15, 10, 0.9350, 0.9304),
    "vgg16bn": Published("VGG-16", 15, 10, 0.9350, 0.9304),
}


def label_runs(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other path has."""
    return [next(end for end in _ends(path) if sum(end in _ends(other) for other in paths) == 1) for path in paths]


def _ends(path: Path) -> list[str]:
    return [str(Path(*path.parts[start:])) for start in reversed(range(len(path.parts)))]


class Runs:
    """Histories by label, and what the page, the picture and the tables read out of them."""

    def __init__(self, histories: Mapping[str, Mapping[str, Any]]) -> None:
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
        """What is published of the models of these runs."""
        models = self.options["model"].values() if self.recipe == "cifar10" else ()
        names = ("".join(filter(str.isalnum, model)).lower() for model in models)
        return list(dict.fromkeys(PUBLISHED[name] for name in names if name in PUBLISHED))

    @property
    def entries(self) -> dict[str, str]:
        """What a legend says of each run: its label, how it differs from others, and whether it has not come to its end."""
        entries = _shorten(dict(zip(self.labels, self.labels, strict=True)), LEGEND_LENGTH)
        for label, name in entries.items():
            notes = [f"{option} {texts[label]}" for option, texts in self.short.items()]
            notes += [] if label in self.finished else ["unfinished"]
            entries[label] = f"{name} ({', '.join(notes)})" if notes else name
        return entries


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
    """The options of the runs, the seed among them, as texts by name and label."""
    untold = {**UNTOLD, "model": UNTOLD_MODELS.get(recipe)}
    told = {label: {**history["options"], "seed": history["seed"]} for label, history in histories.items()}
    given = {label: {name: value for name, value in options.items() if value is not None} for label, options in told.items()}
    names = dict.fromkeys(itertools.chain(OPTIONS, *told.values()))
    return {name: {label: _tell({**untold, **options}.get(name)) for label, options in given.items()} for name in names}


def _tell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def distinct_machines(runs: Mapping[str, RunHistory]) -> set[tuple[str, str]]:
    """The machines and versions of PyTorch that latencies were measured with."""
    return {(run.history["machine"]["device"], run.history["machine"]["torch"]) for run in runs.values()}
