"""The loop of EASIER (arXiv 2404.18949): linearise an activation (replace it by the identity), fine-tune, validate, repeat."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Literal

from torch import nn

from fastentropy.collector.site_statistics import Average, Zero
from fastentropy.collector.statistics import Statistics, check_statistics
from fastentropy.fusion.progress import shown
from fastentropy.pruning.criteria import Criterion
from fastentropy.pruning.loop import Functions, PruningLoop, latency_table
from fastentropy.pruning.options import MAX_DROP, Granularity, Options
from fastentropy.pruning.result import PruningResult
from fastentropy.pruning.steps import Step, StepFolder
from fastentropy.sites.activations import own_modules
from fastentropy.sites.finding import find_sites
from fastentropy.sites.inputs import ExampleInputs, check_function, check_inputs, check_model, site_names
from fastentropy.surgery.site_names import explain_unknown, named_as_now, names_since_isolation

#: What is said of calls that `isolate` has left as they are.
_NOT_OWN = "fe.isolate could give these calls no module of their own"


def prune(
    model: nn.Module,
    *,
    train: Callable[..., object],
    evaluate: Callable[[nn.Module], float],
    calibrate: Callable[[nn.Module], object] | None,
    example_inputs: ExampleInputs,
    max_drop: float = MAX_DROP,
    max_removed: int | None = None,
    per_step: int = 1,
    criterion: Criterion = "entropy",
    zeros_together: bool = False,
    protect: Iterable[str] = (),
    target_speedup: float | None = None,
    max_latency_ms: float | None = None,
    collapse: Literal["project"] | None = None,
    zero: Zero = "discard",
    average: Average = "dataset",
    statistics: Statistics | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    granularity: Granularity = "layer",
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_step: Callable[[Sequence[Step]], object] | None = None,
    progress: bool | None = None,
) -> PruningResult:
    """Linearise the activations of lowest entropy, step by step, until the score falls by more than `max_drop`.

    To linearise an activation is to replace it by the identity. This is the loop of EASIER (arXiv 2404.18949): linearise the
    activation of lowest layer entropy (equation 4), fine-tune, validate, repeat. `prune` works on a copy of the trained model,
    and evaluates the copy before it removes anything. Activations are named by their sites; a site is a call of an activation.

    Args:
        model: the trained model. It is not changed.
        train: a function `train(model)` that fine-tunes the model in place for one schedule. It is called after each removal,
            in training mode.
        evaluate: a function `evaluate(model) -> float`; a higher score is better. It is called once per step, in eval mode and
            without gradients.
        calibrate: a function `calibrate(model)` that runs the training data forward through the model; the entropies are
            measured in these passes. It is called in eval mode and without gradients. With None, the entropies are measured in
            the passes of `train`, which is then called as `train(model, collector)`: `collector.reset()` starts the counts
            again, for example at the last epoch, and `collector.paused()` leaves passes out. None requires `statistics`.
        example_inputs: a tuple of the positional inputs of one call of the model, or a mapping of its keyword inputs. Latency
            is measured for their shapes and device.
        max_drop: stop when the score is more than this below the score of the dense model. In the units of `evaluate`.
        max_removed: the largest number of sites to remove. None sets no limit.
        per_step: how many sites to remove in each step. With `per_step` equal to `max_removed`, there is one step. With the
            granularity "neuron" it is a percentage: how many of all neurons lose their activation in each step.
        criterion: which sites are removed first.
            "entropy": those of lowest layer entropy; among equals, the first in call order.
            "entropy-per-latency": the set of sites that loses the least entropy per millisecond saved. The saved time is that
            of the removed activations and of the operators that `fuse` merges after the removal. It is predicted from times
            that are measured on the device of `example_inputs`. `per_step` is then the number of such sets in each step.
            "random": sites in random order, as a control for comparison. "uniform": the site farthest from all removed sites
            and from both ends of the network, as a second control.
            A function `criterion(model, statistics)` that returns a dict from site to score: those with the lowest scores.
            Sites that are missing from the dict are kept. `checkpoint_dir` identifies the function by its name.
        zeros_together: also remove, in each step, all sites whose entropy is exactly 0, as the code of the paper does.
        protect: the names of sites that are never removed. They need not be modules of their own. The calls of an isolated
            model that have no module of their own are protected in any case, with a warning.
        target_speedup: stop when a call is predicted to be this many times as fast as a call of the given model. Each step
            computes the set of sites that reaches this speed-up at the least loss of entropy, with the entropies of that step,
            and removes only sites of this set. `max_drop` and `max_removed` may stop the run earlier. Requires the criterion
            "entropy-per-latency". None sets no target.
        max_latency_ms: stop when a call is predicted to take at most this many milliseconds. The sites are chosen as with
            `target_speedup`, and only one of the two may be given. None sets no limit.
        collapse: "project" replaces a linearised series of convolutions by one convolution if the exact merged operator would
            be slower. The convolution is fitted by least squares on the calibration data, before the fine-tuning. None
            approximates nothing.
        zero: how entropies treat values that are exactly 0, and
        average: whether they are of all data, or means of the entropies of batches: see `Statistics.layer_entropy`. The code of
            the paper has "on" and "batch".
        statistics: the statistics of the dense model, if they are known already, also those from before `isolate`. Step 0
            then needs no calibration.
        checkpoint_dir: a folder to which every finished step is written. If it already holds steps of a run with the same
            options, the run continues after them. The result is the same as without the interruption if `train` draws its
            random numbers from torch's default generators. None writes nothing.
        granularity: "layer" linearises whole activations. "neuron" replaces the activation of those neurons that have the
            lowest entropies in the whole network: by the identity where the neuron is mostly on, and by 0 where it is mostly
            off, if the activation is close to 0 there. If all neurons of an activation are linear, it is removed; otherwise it
            becomes a `NeuronwiseActivation`. The criterion is "entropy" or "random".
        measure: a function `measure(model)` that returns a dict of further figures by name. They are stored with each step.
            None measures nothing.
        on_step: a function `on_step(steps)` that is called after each step with all steps so far. None calls nothing.
        progress: whether to show the phase, and how many activations are removed, on a line of the standard error. By default,
            only a terminal shows it.

    Returns:
        The kept network and all steps.

    Raises:
        TypeError: `model`, `example_inputs` or a function is of another kind, or the model takes other inputs.
        ValueError: the model calls no known activation, or one that is neither protected nor a module of its own, and it was
            not isolated (see `isolate`); an option is out of range; a latency cannot be reached; `calibrate` makes no forward
            pass; `train` replaces modules; a score is not a finite number; `checkpoint_dir` is damaged, or holds a run of
            another model or with other options.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> _ = torch.nn.init.constant_(model[0].bias, 100.0)  # the first ReLU is always on: its entropy is 0
        >>> x, labels = torch.randn(64, 4), torch.arange(64) % 2
        >>> def train(model):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        ...     torch.nn.functional.cross_entropy(model(x), labels).backward()
        ...     optimizer.step()
        >>> def accuracy(model):
        ...     return (model(x).argmax(1) == labels).float().mean()
        >>> result = fe.prune(
        ...     model,
        ...     train=train,
        ...     evaluate=accuracy,
        ...     calibrate=lambda model: model(x),
        ...     example_inputs=(x,),
        ...     max_drop=1.0,
        ...     max_removed=1,
        ... )
        >>> result.removed
        ('1',)
        >>> result.steps[0].layer_entropy["1"]
        0.0
    """
    check_model(model)
    inputs = check_inputs(example_inputs, "fe.prune(model, example_inputs={}, …)")
    functions = Functions(train, evaluate, calibrate, measure, on_step)
    _check_functions(functions)
    options = Options(
        max_drop,
        max_removed,
        per_step,
        criterion,
        zeros_together,
        site_names(protect, "protect"),
        target_speedup,
        max_latency_ms,
        collapse,
        zero,
        average,
        granularity,
    )
    sites = [site.name for site in find_sites(model, inputs)]
    check_names(options.protect, sites, "protect", model)
    options = _protected(model, sites, options)
    if statistics is not None:
        check_statistics(statistics)
        statistics = named_as_now(statistics, model)
    _check_statistics(calibrate, statistics, sites, collapse)
    folder = None if checkpoint_dir is None else StepFolder(checkpoint_dir, options.to_dict())
    dense = copy.deepcopy(model).eval()
    with shown(progress, command="prune") as show:
        table = latency_table(dense, inputs, sites, options, folder, show)
        loop = PruningLoop(dense, sites, functions, options, folder, table, show)
        kept = _run(loop, statistics)
    kept_step = len(loop.steps) - (1 if loop.within_max_drop() else 2)
    removed = tuple(name for step in loop.steps[: kept_step + 1] for name in step.removed)
    if kept is None:
        kept = loop.restore(copy.deepcopy(model), kept_step)
    return PruningResult(kept.eval(), removed, tuple(loop.steps), kept_step, inputs)


def _run(loop: PruningLoop, statistics: Statistics | None) -> nn.Module | None:
    """Run all steps that are not finished yet.

    Args:
        loop: the state of the run.
        statistics: the statistics of the dense model, if they are known.

    Returns:
        The last network within `max_drop`, or None if the run had ended before, so that only its folder holds this network.
    """
    loop.resume()
    if not loop.steps:
        loop.run_step((), {}, statistics)
    kept = None
    while loop.within_max_drop():
        kept = copy.deepcopy(loop.model)
        names, neurons = loop.next_removal()
        if not (names or neurons):
            break
        loop.run_step(names, neurons)
    return kept


def check_names(names: Sequence[str], sites: Sequence[str], option: str, model: nn.Module) -> None:
    """Raise ValueError if an option names something that is not a site of the model.

    Args:
        names: the names that were given.
        sites: the names of all sites of the model.
        option: the name of the option, for the message.
        model: the model.
    """
    for name in names:
        if name not in sites:
            explanation = explain_unknown(name, model, sites, all_calls=True)
            raise ValueError(f"{option} names {name!r}, which is not a site of the model{explanation}")


def _check_functions(functions: Functions) -> None:
    """Raise TypeError if something else was given in place of one of the user's functions."""
    uses = {
        "train": "train(model)",
        "evaluate": "evaluate(model)",
        "calibrate": "calibrate(model)",
        "measure": "measure(model)",
        "on_step": "on_step(steps)",
    }
    for name, use in uses.items():
        function = getattr(functions, name)
        if function is not None or name in ("train", "evaluate"):
            check_function(function, name, use)


def _check_statistics(calibrate: object, statistics: Statistics | None, sites: Sequence[str], collapse: object) -> None:
    """Raise ValueError if the entropies cannot be measured with these options, or `statistics` are of another model."""
    if calibrate is None and (statistics is None or collapse):
        lacking = "collapse needs calibrate" if collapse else "without calibrate, the dense model's statistics= are needed"
        raise ValueError(f"{lacking}; collect them in its last epoch with fe.collect, or give a function calibrate(model)")
    if statistics is not None and set(statistics) != set(sites):
        named = ", ".join(sorted(set(statistics) ^ set(sites)))
        raise ValueError(f"statistics belong to another model: they differ from the given one in the sites {named}")


def _protected(model: nn.Module, sites: Sequence[str], options: Options) -> Options:
    """Return the options with those sites protected, too, that `isolate` could give no module of their own.

    Args:
        model: the model.
        sites: the names of its sites.
        options: the options of the run.

    Returns:
        The options.

    Raises:
        ValueError: the model was not isolated, and a site that may be removed is not a module that is called once per forward
            pass; or no site may be removed any more.
    """
    removable = own_modules(model, sites)
    others = [name for name in sites if name not in removable and name not in options.protect]
    if not others:
        return options
    if names_since_isolation(model) is None:
        raise ValueError(
            f"{', '.join(others)}: an activation that is called as a function, or several times in one forward pass, cannot be "
            "linearised on its own; prune the model that fe.isolate(model, example_inputs) returns, or protect these"
        )
    if not set(removable) - set(options.protect):
        raise ValueError(f"{', '.join(others)}: {_NOT_OWN}, so no activation of the model can be removed")
    warnings.warn(f"{', '.join(others)}: protected, because {_NOT_OWN}", stacklevel=3)
    return replace(options, protect=(*options.protect, *others))
