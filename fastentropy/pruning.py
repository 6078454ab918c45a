"""The EASIER loop (arXiv 2404.18949): linearise the activation of lowest entropy, fine-tune, validate, repeat."""

import copy
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastentropy.activations import activation_modules
from fastentropy.collector import collect
from fastentropy.interception import fast_paths
from fastentropy.sites import find_sites, no_sites
from fastentropy.statistics import Statistics
from fastentropy.steps import Step, StepFolder, random_state, set_random_state

Criterion = Literal["entropy"]


@dataclass(frozen=True)
class PruningResult:
    """The last network whose score held, what was removed from it, and all steps; a step after kept_step fell too far."""

    model: nn.Module
    removed: tuple[str, ...]
    steps: tuple[Step, ...]
    kept_step: int


def prune(
    model: nn.Module,
    *,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], float],
    calibrate: Callable[[nn.Module], object],
    example_inputs: tuple[Any, ...],
    max_drop: float = 0.01,
    max_removed: int | None = None,
    per_step: int = 1,
    criterion: Criterion = "entropy",
    checkpoint_dir: str | PathLike[str] | None = None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_step: Callable[[Sequence[Step]], object] | None = None,
) -> PruningResult:
    """Linearise the activations of lowest entropy, step after step, as long as the score holds.

    The trained model is not changed: the loop works on a copy, and evaluates it before it removes anything.

    train(model): one fine-tuning schedule, in place, after each removal; called in training mode.
    evaluate(model) -> float: higher is better; called once per step, in eval mode and without gradients.
    calibrate(model): forward passes over the training data, in eval mode and without gradients; they are what is measured.
    example_inputs: the positional inputs of one call.
    max_drop: stop where the score is more than this below the dense model's, in the units of `evaluate`.
    max_removed: remove at most so many sites. per_step: how many of them in one step.
    criterion: "entropy" removes the lowest layer entropy first, and of equal ones the first in call order.
    checkpoint_dir: write every finished step there, and go on from the steps that are there already, if they are of a run with
        the same options. The end is the same as without the interruption where `train` draws from torch's default generators.
    measure(model) -> dict: further figures to keep with each step. on_step(steps so far): called after each step.

    Raises ValueError for a model without a known activation or with one that is no module of its own (see `isolate`), an option
    out of range, a calibration without a forward pass, a score that is not finite, and a checkpoint_dir that is damaged, of
    another model or of a run with other options.
    """
    _check_options(max_drop, max_removed, per_step, criterion)
    sites = [site.name for site in find_sites(model, example_inputs)]
    _check_own_modules(model, sites)
    loop = _Loop(copy.deepcopy(model), train, evaluate, calibrate, measure, on_step)
    if checkpoint_dir is not None:
        options = {"max_drop": max_drop, "max_removed": max_removed, "per_step": per_step, "criterion": criterion}
        loop.resume(StepFolder(checkpoint_dir, options), sites)
    if not loop.steps:
        loop.turn(())
    kept = None
    while loop.holds(max_drop):
        kept = copy.deepcopy(loop.model)
        left = per_step if max_removed is None else min(per_step, max_removed - len(loop.removed))
        if not (names := lowest_entropy(loop.steps[-1].layer_entropy, left)):
            break
        loop.turn(names)
    kept_step = len(loop.steps) - (1 if loop.holds(max_drop) else 2)
    removed = tuple(name for step in loop.steps[: kept_step + 1] for name in step.removed)
    if kept is None:
        kept = loop.restore(copy.deepcopy(model), kept_step)
    return PruningResult(kept.eval(), removed, tuple(loop.steps), kept_step)


def linearize(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the named activation modules by the identity, in place: all of them, or none where this raises.

    Raises ValueError for a name that is not an activation of the model, with the nearest ones that are, and for a module that
    the model holds under several names.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of site names, not the string {names!r}: [{names!r}]")
    if not names:
        return
    modules = activation_modules(model)
    if not modules:
        raise ValueError(no_sites(model))
    paths = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name not in modules:
            nearest = difflib.get_close_matches(name, modules, n=3, cutoff=0.0)
            raise ValueError(f"{name!r} is not an activation module of the model; the nearest are {', '.join(nearest)}")
        if paths.count(id(modules[name])) > 1:
            raise ValueError(f"the module {name!r} stands in several places of the model; give each its own activation module")
    for name in names:
        model.set_submodule(name, nn.Identity().train(modules[name].training))
        for module, attribute, value in fast_paths(model.get_submodule(name.rpartition(".")[0])):
            setattr(module, attribute, value)  # that kernel would go on computing the activation


def lowest_entropy(layer_entropy: Mapping[str, float], count: int) -> tuple[str, ...]:
    """The names of the `count` sites with the lowest entropy; of equal ones, those that come first."""
    return tuple(sorted(layer_entropy, key=lambda name: layer_entropy[name])[: max(count, 0)])


class _Loop:
    """The state of a run: the network in work, the finished steps, and the random state that the next step starts from."""

    def __init__(
        self,
        model: nn.Module,
        train: Callable[[nn.Module], object],
        evaluate: Callable[[nn.Module], float],
        calibrate: Callable[[nn.Module], object],
        measure: Callable[[nn.Module], Mapping[str, float]] | None,
        on_step: Callable[[Sequence[Step]], object] | None,
    ) -> None:
        self.model, self.steps = model, list[Step]()
        self._train, self._evaluate, self._calibrate = train, evaluate, calibrate
        self._measure, self._on_step = measure, on_step
        self._folder: StepFolder | None = None
        self._random_state: dict[str, Tensor] = {}

    @property
    def removed(self) -> list[str]:
        return [name for step in self.steps for name in step.removed]

    def resume(self, folder: StepFolder, sites: Sequence[str]) -> None:
        """Take up the steps that a folder holds, and write the next ones there."""
        self._folder, self.steps = folder, folder.load()
        if self.steps:
            if set(self.steps[0].layer_entropy) != set(sites):
                raise ValueError(f"checkpoint_dir {folder.path} holds a run of another model; name another folder")
            self.restore(self.model, len(self.steps) - 1)
            self._random_state = folder.restore_random_state(len(self.steps) - 1)

    def restore(self, model: nn.Module, index: int) -> nn.Module:
        """Bring a copy of the dense model to where it was at the end of a step."""
        assert self._folder is not None
        linearize(model, [name for step in self.steps[: index + 1] for name in step.removed])
        self._folder.load_weights(index, model)
        return model

    def holds(self, max_drop: float) -> bool:
        """Whether the last score is at most max_drop below the dense model's, but for rounding."""
        return self.steps[0].score - self.steps[-1].score <= max_drop + 1e-9

    def turn(self, names: tuple[str, ...]) -> None:
        """Linearise, fine-tune, validate and measure; with no names, only the last two."""
        if names:
            linearize(self.model, names)
            set_random_state(self._random_state)
            self.model.train()
            self._train(self.model)
        self.model.eval()
        score = self._score(names)
        statistics = self._statistics()
        metrics = dict(self._measure(self.model)) if self._measure else {}
        step = Step(names, statistics.layer_entropy(), score, metrics)
        self._random_state = random_state()
        if self._folder:
            self._folder.save(len(self.steps), step, self.model, statistics, self._random_state)
        self.steps.append(step)
        if self._on_step:
            self._on_step(tuple(self.steps))

    @torch.no_grad()
    def _score(self, names: tuple[str, ...]) -> float:
        score = float(self._evaluate(self.model))
        if not math.isfinite(score):
            raise ValueError(
                f"evaluate returned {score} after the removal of {', '.join(names) or 'nothing'}; "
                "it must return a finite number, higher for a better model"
            )
        return score

    @torch.no_grad()
    def _statistics(self) -> Statistics:
        if not activation_modules(self.model):
            return Statistics({})  # every activation is linearised
        with collect(self.model) as collector:
            self._calibrate(self.model)
        try:
            return collector.compute()
        except RuntimeError as error:
            message = "calibrate made no forward pass of the model it was given; call model(batch) on the training data in it"
            raise ValueError(message) from error


def _check_options(max_drop: float, max_removed: int | None, per_step: int, criterion: str) -> None:
    if not max_drop >= 0:
        raise ValueError(f"max_drop is {max_drop}; expected 0 or more, in the units of evaluate")
    if max_removed is not None and max_removed < 0:
        raise ValueError(f"max_removed is {max_removed}; expected 0 or more, or None for no limit")
    if per_step < 1:
        raise ValueError(f"per_step is {per_step}; expected 1 or more")
    if criterion != "entropy":
        raise ValueError(f"criterion is {criterion!r}; expected 'entropy'")


def _check_own_modules(model: nn.Module, sites: Sequence[str]) -> None:
    modules = activation_modules(model)
    if others := [name for name in sites if name not in modules]:
        raise ValueError(
            f"{', '.join(others)}: activations that are called as functions, or by one module several times in a forward pass, "
            "cannot be linearised one by one; prune the model that fe.isolate(model, example_inputs) returns"
        )
