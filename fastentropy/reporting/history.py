"""The history of a pruning run (`history.json`): a check of its form, and the values that pages and plots show."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastentropy._utils.text import plural


class RunHistory:
    """The history of a run with at least one finished step.

    Step 0 is the dense network. Each further step removes activations and fine-tunes the network.

    Attributes:
        history: the parsed `history.json`.
        steps: the entries of the history's "steps", in order.
        kept_step: the index of the step whose network the run keeps, or of the last step if the run is unfinished.
        fusion: the report on fusing the kept network, or None if the run is unfinished.
        dense: the entry of step 0.
        kept: the entry of the kept step.
        sites: the names of the sites (calls of an activation) of the dense network, in call order.
        is_by_neuron: whether the run replaced the activation of single neurons.
        depths: for each step, the number of activations removed up to and including it, or of neurons replaced.
        unit: what `depths` counts: "activations removed" or "neurons replaced".
        tried_at: the index of the step that removed an activation, by name, also if that step was rejected.
    """

    def __init__(self, history: Mapping[str, Any]) -> None:
        """Read a parsed `history.json`. `check_history` must accept it, and it must have a step."""
        self.history = history
        self.steps: Sequence[Mapping[str, Any]] = history["steps"]
        self.kept_step: int = len(self.steps) - 1 if history["kept_step"] is None else history["kept_step"]
        self.fusion: Mapping[str, Any] | None = history["fusion"]
        self.dense, self.kept = self.steps[0], self.steps[self.kept_step]
        self.sites: list[str] = list(self.dense["layer_entropy"])
        self.is_by_neuron = self.options.get("granularity") == "neuron"
        self.unit = "neurons replaced" if self.is_by_neuron else "activations removed"
        count = _replaced if self.is_by_neuron else _removed
        self.depths = list(itertools.accumulate(map(count, self.steps)))
        self.tried_at = {name: index for index, step in enumerate(self.steps) for name in step["removed"]}

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the run without those that are None, False or an empty list."""
        given = self.history["options"].items()
        return {name: value for name, value in given if value is not None and value is not False and value != []}

    @property
    def removed(self) -> int:
        """Return the number of activations that are removed in the kept network."""
        return sum(map(_removed, self.steps[: self.kept_step + 1]))

    @property
    def neuron_shares(self) -> dict[str, tuple[float, float]]:
        """Return the shares of linear and of constant neurons in the kept network, by name of the site, in call order."""
        shares = dict.fromkeys(self.sites, (0.0, 0.0))
        for step in self.steps[: self.kept_step + 1]:
            for name, each in step.get("neurons", {}).items():
                linear, constant = shares[name]
                shares[name] = linear + each["linear"] / each["neurons"], constant + each["constant"] / each["neurons"]
        return shares

    @property
    def rejected_step(self) -> int | None:
        """Return the index of the first step whose validation accuracy fell too far, or None if no step was rejected."""
        return self.kept_step + 1 if self.kept_step + 1 < len(self.steps) else None

    @property
    def lowest_validation(self) -> float:
        """Return the validation accuracy that a step must reach to be kept."""
        return float(self.dense["validation"] - self.history["options"]["max_drop"])

    @property
    def latency(self) -> Mapping[str, float]:
        """Return the milliseconds per call of the dense and the kept network, each before and after fusing.

        They are measured side by side at the end of a run. If the run is unfinished, they are those of its steps.

        Returns:
            The times by "dense", "dense_fused", "pruned" and "fused". The last two are of the kept network.
        """
        dense, kept = self.dense["latency_ms"], self.kept["latency_ms"]
        steps = {"dense": dense["pruned"], "dense_fused": dense["fused"], "pruned": kept["pruned"], "fused": kept["fused"]}
        return self.history["latency_ms"] or steps

    @property
    def speedup(self) -> float:
        """Return the time of the dense network divided by the time of the fused kept network."""
        return self.latency["dense"] / self.latency["fused"]

    @property
    def collapsed(self) -> list[Mapping[str, Any]]:
        """Return an entry for each stretch (consecutive modules) that one convolution replaces in the kept network."""
        return [projection for step in self.steps[: self.kept_step + 1] for projection in step["collapsed"]]

    def entropy_before(self, index: int) -> dict[str, float]:
        """Return the entropy in bits, in the step before, of each site that the step with this index removed, by name."""
        return {name: self.steps[index - 1]["layer_entropy"][name] for name in self.steps[index]["removed"]}


def _removed(step: Mapping[str, Any]) -> int:
    """Return how many activations a step removed."""
    return len(step["removed"])


def _replaced(step: Mapping[str, Any]) -> int:
    """Return how many neurons a step replaced."""
    return sum(each["linear"] + each["constant"] for each in step.get("neurons", {}).values())


def check_history(history: Mapping[str, Any]) -> None:
    """Check that a history has every value that pages show, in the right type and range.

    Args:
        history: the parsed `history.json`.

    Raises:
        ValueError: a value is missing, or has a wrong type or range. The message names the value.
    """
    check_form(history, _HISTORY, "the history")
    for name, form in _WHEN_FINISHED.items():
        if history["kept_step"] is not None or history[name] is not None:
            check_form(history[name], form, name)
    steps = history["steps"]
    if history["kept_step"] is not None and not 0 <= history["kept_step"] < len(steps):
        raise ValueError(f"kept_step is {history['kept_step']}; the history has only {plural(len(steps), 'step')}")
    for index, step in enumerate(steps):
        check_form(step.get("neurons", {}), _NEURONS, f"steps[{index}].neurons")
        if unknown := set(step.get("neurons", {})) - set(steps[0]["layer_entropy"]):
            raise ValueError(f"step {index} replaced neurons of {', '.join(sorted(unknown))}, which the dense network lacks")
        if any(not 0 < each["linear"] + each["constant"] <= each["neurons"] for each in step.get("neurons", {}).values()):
            raise ValueError(f"step {index} replaced no neurons of a site, or more than it has")
        left = set(steps[0]["layer_entropy"]).intersection(steps[index - 1]["layer_entropy"]) if index else set()
        if unknown := set(step["removed"]) - left:
            raise ValueError(f"step {index} removed {', '.join(sorted(unknown))}, for which the steps before have no entropy")
    latencies = [step["latency_ms"] for step in steps] + [history["latency_ms"], (history["fusion"] or {}).get("milliseconds")]
    if any(value <= 0 for times in latencies for value in (times or {}).values()):
        raise ValueError("a latency is 0 or less; expected milliseconds")


#: The expected form of a history, as `check_form` takes it.
_PROJECTION = {"modules": [str], "relative_error": float, "centre_error": float}
_NEURONS = {str: {"neurons": int, "linear": int, "constant": int}}
_STEP = {
    "removed": [str],
    "layer_entropy": {str: float},
    "validation": float,
    "test": float,
    "latency_ms": {"pruned": float, "fused": float},
    "collapsed": [_PROJECTION],
}
_HISTORY = {
    "recipe": str,
    "seed": int,
    "options": {"max_drop": float},
    "machine": {"device": str, "torch": str, "date": str},
    "steps": [_STEP],
    "kept_step": object,
    "fusion": object,
    "latency_ms": object,
}
_CANDIDATE = {"milliseconds": float, "operators": int, "multiplications": float, "relative_error": float}
_WHEN_FINISHED = {
    "kept_step": int,
    "fusion": {
        "max_relative_error": float,
        "choice": str,
        "milliseconds": {"original": float, "folded": float, "fused": float},
        "chains": [{"names": [str], "candidates": {str: _CANDIDATE}, "choice": str, "note": str}],
    },
    "latency_ms": {"dense": float, "dense_fused": float, "pruned": float, "fused": float},
}
_NAMES = {float: "a number", int: "an integer", str: "a text", list: "a list", dict: "an object"}


def check_form(value: Any, form: Any, where: str) -> None:
    """Raise ValueError if a value that was read from JSON does not have the expected form.

    Args:
        value: the value.
        form: its expected form: `[form of each item]`, `{name: form of its value}`, `{str: form of every value}` or a type.
            `object` allows anything, and `float` also allows an int.
        where: the path of the value, for the message; for the whole content of a file, "the" and what it is.
    """
    if form is object:
        return
    kind: Any = form if isinstance(form, type) else type(form)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{where} is {value!r:.40}; expected {_NAMES[kind]}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; expected a finite number")
    if kind is list:
        for index, each in enumerate(value):
            check_form(each, form[0], f"{where}[{index}]")
    elif kind is dict:
        for name in value if str in form else form:
            if name not in value:
                raise ValueError(f"{where} lacks {name}")
            inside = name if where.startswith("the ") else f"{where}.{name}"
            check_form(value[name], form[str] if str in form else form[name], inside)
