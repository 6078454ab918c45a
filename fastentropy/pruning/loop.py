"""The loop of `prune`: the state of a run, and the work of one step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastentropy.collector.api import collect
from fastentropy.collector.collector import EntropyCollector
from fastentropy.collector.statistics import Statistics
from fastentropy.fusion.latency import LatencyTable, measure_latency
from fastentropy.fusion.progress import Progress, ignore
from fastentropy.fusion.projection import Projection, project
from fastentropy.pruning.criteria import best_trade, check_budget, lowest, scores
from fastentropy.pruning.neurons import next_neurons
from fastentropy.pruning.options import Options
from fastentropy.pruning.steps import Step, StepFolder, random_state, set_random_state
from fastentropy.sites.activations import activation_modules, own_modules
from fastentropy.sites.inputs import ExampleInputs
from fastentropy.surgery.linearization import replace_by_identity
from fastentropy.surgery.neuron_replacement import ReplacedNeurons, replace_neurons


class Functions(NamedTuple):
    """The functions that the user gives to `prune`, under the names of its arguments."""

    train: Callable[..., object]
    evaluate: Callable[[nn.Module], Any]
    calibrate: Callable[[nn.Module], object] | None
    measure: Callable[[nn.Module], Mapping[str, float]] | None
    on_step: Callable[[Sequence[Step]], object] | None


def latency_table(
    model: nn.Module,
    example_inputs: ExampleInputs,
    sites: Sequence[str],
    options: Options,
    folder: StepFolder | None,
    show: Progress = ignore,
) -> LatencyTable | None:
    """Measure the latency of a dense model and of its parts, or read the latencies that a resumed run began with.

    Args:
        model: the dense model in eval mode.
        example_inputs: the positional inputs of one call, or a mapping of its keyword inputs. The latency is measured for
            their shapes and device.
        sites: the names of all sites (calls of activations) of the model.
        options: the options of the run.
        folder: the folder of the run, or None. Measured latencies are written to it.
        show: receives the phase of the work.

    Returns:
        The latencies, or None if the options need none.

    Raises:
        ValueError: a budget cannot be met, or the folder holds the latencies of another model.
    """
    if not options.needs_latency:
        return None
    show("measure latencies", 0, 0)
    known, own = folder.load_latency() if folder else None, own_modules(model, sites)
    table = known or measure_latency(model, example_inputs, own, approximate=options.collapse is not None)
    if table.sites != set(own):
        raise ValueError(f"checkpoint_dir {folder and folder.path} holds a run of another model; name another folder")
    if (budget := options.budget(table)) is not None:
        check_budget(table, [name for name in own if name not in options.protect], budget)
    if folder and known is None:
        folder.save_latency(table)
    return table


class PruningLoop:
    """The state of a run: the current network, the finished steps, and the random state that the next step starts from.

    Attributes:
        model: the current network.
        steps: the finished steps.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        functions: Functions,
        options: Options,
        folder: StepFolder | None,
        table: LatencyTable | None,
        show: Progress = ignore,
    ) -> None:
        """Begin with a dense model, which the loop changes.

        Args:
            model: the dense model.
            sites: the names of its sites (calls of activations), in call order.
            functions: the user's functions.
            options: the options of the run.
            folder: where the steps are stored, or None.
            table: the latencies of the dense model, or None if the options do not need them.
            show: receives the phase of the work, the number of removed sites, and the number of sites that may be removed.
        """
        self.model, self.steps = model, list[Step]()
        self._sites, self._functions, self._options = sites, functions, options
        self._folder, self._table, self._show = folder, table, show
        self._statistics = Statistics({})
        self._random_state: dict[str, Tensor] = {}

    @property
    def removed(self) -> list[str]:
        """Return the names of the sites that are linearised so far, in the order of their removal."""
        return [name for step in self.steps for name in step.removed]

    def _report(self, phase: str) -> None:
        """Show how far the run is, and what it does now."""
        self._show(f"step {len(self.steps)}, {phase}", len(self.removed), self._options.most_removed(self._sites))

    def resume(self) -> None:
        """Load the finished steps of an interrupted run from the folder, so that the run continues after them.

        Raises:
            ValueError: the folder is damaged, or it holds a run of another model.
        """
        if self._folder is None:
            return
        self.steps = self._folder.load()
        if self.steps:
            if set(self.steps[0].layer_entropy) != set(self._sites):
                raise ValueError(f"checkpoint_dir {self._folder.path} holds a run of another model; name another folder")
            last = len(self.steps) - 1
            self.restore(self.model, last).eval()
            self._update_table([projection for step in self.steps for projection in step.collapsed])
            self._statistics = self._folder.load_statistics(last)
            self._random_state = self._folder.restore_random_state(last)

    def restore(self, model: nn.Module, index: int) -> nn.Module:
        """Turn a copy of the dense model, in place, into the network at the end of a finished step.

        Args:
            model: the copy, which is changed.
            index: the index of the step.

        Returns:
            The same model.

        Raises:
            ValueError: the folder is damaged, or its step does not fit the model.
        """
        assert self._folder is not None
        return self._folder.restore(model, self.steps[: index + 1])

    def within_max_drop(self) -> bool:
        """Return whether the last score is at most `max_drop` below the score of the dense model, apart from rounding."""
        return self.steps[0].score - self.steps[-1].score <= self._options.max_drop + 1e-9

    def next_removal(self) -> tuple[tuple[str, ...], dict[str, ReplacedNeurons]]:
        """Return the sites to linearise in the next step, and the neurons to replace. Without both, the run is at its end."""
        set_random_state(self._random_state)
        if self._options.granularity == "neuron":
            return next_neurons(self.model, self._statistics, self._options)
        return self._next_sites(), {}

    def _next_sites(self) -> tuple[str, ...]:
        """Return the names of the sites to linearise in the next step."""
        options = self._options
        entropies = self.steps[-1].layer_entropy
        losses = {name: bits for name, bits in entropies.items() if name not in options.protect}
        left = len(losses) if options.max_removed is None else options.max_removed - len(self.removed)
        if options.criterion == "entropy-per-latency":
            names = self._best_trades(losses, left)
        else:
            scored = scores(options.criterion, self.model, self._statistics, entropies, self._sites)
            allowed = {name: score for name, score in scored.items() if name in losses}
            names = lowest(allowed, min(options.per_step, left))
        if names and options.zeros_together:
            zeros = [name for name, bits in losses.items() if bits == 0 and name not in names]
            names += tuple(zeros[: left - len(names)])
        return names

    def run_step(
        self, names: tuple[str, ...], neurons: Mapping[str, ReplacedNeurons], statistics: Statistics | None = None
    ) -> None:
        """Linearise sites, replace neurons, fine-tune, evaluate and calibrate, and store the step.

        Args:
            names: the sites to linearise.
            neurons: the neurons to replace, by site. If nothing is removed (in step 0), the model is only evaluated and
                calibrated.
            statistics: in step 0, the statistics of the dense model if they are known. They replace the calibration.
        """
        collapsed: tuple[Projection, ...] = ()
        if names or neurons:
            replace_neurons(self.model, neurons)
            replace_by_identity(self.model, names)
            collapsed = self._collapse([*self.removed, *names])
            self._update_table(collapsed)
            set_random_state(self._random_state)
            self._report("train")
            statistics = self._train()
        self.model.eval()
        self._report("evaluate")
        score = self._score(list({**dict.fromkeys(names), **neurons}))
        if statistics is None:
            self._report("measure entropies")
        self._statistics = self._calibrate() if statistics is None else statistics
        entropies = self._statistics.layer_entropy(self._options.zero, self._options.average)
        step = Step(names, entropies, score, self._metrics(names), collapsed, dict(neurons))
        self._random_state = random_state()
        if self._folder:
            self._folder.save(len(self.steps), step, self.model, self._statistics, self._random_state)
        self.steps.append(step)
        if self._functions.on_step:
            self._functions.on_step(tuple(self.steps))

    def _best_trades(self, losses: Mapping[str, float], left: int) -> tuple[str, ...]:
        """Return the sites to remove by the criterion "entropy-per-latency", in call order.

        These are the sites of up to `per_step` sets. Each set loses the least entropy per millisecond saved after the sets
        before it.

        Args:
            losses: the layer entropy, in bits, of each site that may be removed.
            left: how many sites may still be removed.
        """
        assert self._table is not None
        budget, chosen = self._options.budget(self._table), set[str]()
        for _ in range(self._options.per_step):
            removed = [*self.removed, *chosen]
            if budget is not None and self._table.fastest(removed).milliseconds <= budget:
                break
            chosen |= best_trade(self._table, losses, removed, left - len(chosen), budget)
        return tuple(name for name in self._sites if name in chosen)

    def _collapse(self, removed: Sequence[str]) -> tuple[Projection, ...]:
        """Replace modules by fitted convolutions, as the option `collapse` asks for.

        A series of modules is replaced if the network without `removed` is predicted to be fastest with one convolution in its
        place.

        Args:
            removed: the names of all sites that are linearised, including those of this step.

        Returns:
            The replacements.
        """
        if self._options.collapse is None:
            return ()
        assert self._table is not None
        assert self._functions.calibrate is not None
        self.model.eval()
        set_random_state(self._random_state)
        stretches = self._table.fastest(removed).projected
        return tuple(project(self.model, modules, self._functions.calibrate) for modules in stretches)

    def _update_table(self, collapsed: Sequence[Projection]) -> None:
        """Note in the table of latencies that these series of modules are now fitted convolutions."""
        for projection in collapsed:
            assert self._table is not None
            self._table = self._table.collapsed(projection.modules)

    def _train(self) -> Statistics | None:
        """Fine-tune the model. Return the statistics of these passes if there is no calibration function; otherwise None."""
        before = {name: type(module) for name, module in self.model.named_modules()}
        statistics = None
        self.model.train()
        if self._functions.calibrate:
            self._functions.train(self.model)
        elif not activation_modules(self.model):
            self._functions.train(self.model, EntropyCollector(self.model))
            statistics = Statistics({})
        else:
            with collect(self.model, average=self._options.average) as collector:
                self._functions.train(self.model, collector)
            statistics = _compute(collector, "train")
        after = {name: type(module) for name, module in self.model.named_modules()}
        changed = [name for name in before | after if not issubclass(after.get(name, object), before.get(name, nn.Module))]
        if changed or before.keys() != after.keys():
            named = ", ".join(changed or sorted(before.keys() ^ after.keys()))
            raise ValueError(f"train changed the modules of the model ({named}); it must train the given model in place")
        return statistics

    @torch.no_grad()
    def _score(self, names: Sequence[str]) -> float:
        """Return the score that `evaluate` gives the model. Raise ValueError if it is not a finite number.

        Args:
            names: the sites that this step has changed, for the message.
        """
        value = self._functions.evaluate(self.model)
        when = f"after the removal of {', '.join(names) or 'nothing'}"
        try:
            score = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            message = f"evaluate returned a {type(value).__name__}, not a number, {when}; it must return a finite number"
            raise ValueError(message) from error
        if not math.isfinite(score):
            raise ValueError(f"evaluate returned {score} {when}; it must return a finite number, higher for a better model")
        return score

    @torch.no_grad()
    def _calibrate(self) -> Statistics:
        """Call the user's function `calibrate`, and return the statistics of the forward passes that it makes."""
        assert self._functions.calibrate is not None
        if not activation_modules(self.model):
            return Statistics({})  # no activation is left
        with collect(self.model, average=self._options.average) as collector:
            self._functions.calibrate(self.model)
        return _compute(collector, "calibrate")

    def _metrics(self, names: tuple[str, ...]) -> dict[str, float]:
        """Return the figures to store with a step: the predicted latency, if there is a table, and those of `measure`.

        Args:
            names: the sites that this step has linearised.
        """
        predicted = {"predicted_ms": self._table.fastest([*self.removed, *names]).milliseconds} if self._table else {}
        return predicted | (dict(self._functions.measure(self.model)) if self._functions.measure else {})


def _compute(collector: EntropyCollector, function: str) -> Statistics:
    """Return the statistics of a collector. Raise ValueError if nothing was counted.

    Args:
        collector: the collector.
        function: the name of the user's function that should have run the model, for the message.
    """
    try:
        return collector.compute()
    except RuntimeError as error:
        message = f"{function} made no forward pass of the given model; it must call model(batch) on the training data"
        raise ValueError(message) from error
