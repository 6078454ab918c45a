"""Hold the outcome of `prune`: the kept network, and every step of the run."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastentropy._utils.text import format_table, plural
from fastentropy.fusion import FusedModel, fuse
from fastentropy.pruning.steps import Step
from fastentropy.sites.inputs import ExampleInputs


@dataclass(frozen=True)
class PruningResult:
    """The last network whose score was within `max_drop`, and every step of the run.

    Attributes:
        model: the network that was kept, in eval mode.
        removed: the names of the sites (calls of activations) that are linearised in `model`, in the order of their removal. A
            linearised activation is replaced by the identity.
        steps: every step that was run; step 0 is the dense network.
        kept_step: the index in `steps` of the step that `model` comes from. If there is a later step, its score fell by more
            than `max_drop`.
        example_inputs: the example inputs that `prune` was given, for which `fuse` makes the network fast.

    `print` shows a table of the steps.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> _ = torch.nn.init.constant_(model[0].bias, 100.0)  # all neurons are always on: their entropy is 0
        >>> x = torch.randn(16, 4)
        >>> result = fe.prune(
        ...     model,
        ...     train=lambda model: None,
        ...     evaluate=lambda model: 1.0,
        ...     calibrate=lambda model: model(x),
        ...     example_inputs=(x,),
        ... )
        >>> result.removed, result.kept_step, len(result.steps)
        (('1',), 1, 2)
        >>> print(result)
        removed    step   bits   score
        ---------  ----  -----  ------
        (nothing)     0         1.0000
        1 *           1  0.000  1.0000
        <BLANKLINE>
        1 of 1 activation removed up to step 1 (*): score 1.0000, 1.0000 before
        >>> result.model
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): Identity()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """

    model: nn.Module
    removed: tuple[str, ...]
    steps: tuple[Step, ...]
    kept_step: int
    example_inputs: ExampleInputs = field(default=(), repr=False)

    def fuse(self, **options: Any) -> FusedModel:
        """Return the kept network in the form that runs fastest: `fe.fuse(result.model, result.example_inputs)`.

        Args:
            **options: the keyword arguments of `fe.fuse`, such as `backend="auto"`.

        Returns:
            The fused network.

        Raises:
            ValueError: as `fe.fuse` does.
        """
        return fuse(self.model, self.example_inputs, **options)

    def __str__(self) -> str:
        """Return a table of the steps, and a line that sums up the run."""
        rows: list[list[str]] = []
        marks: list[str] = []
        metrics = list(dict.fromkeys(name for step in self.steps for name in step.metrics))
        for index, step in enumerate(self.steps):
            before = self.steps[index - 1].layer_entropy if index else {}
            figures = [f"{step.score:.4f}", *(f"{step.metrics[name]:.4g}" if name in step.metrics else "" for name in metrics)]
            for name in _changes(step):
                rows.append([name, str(index), f"{before[name]:.3f}" if name in before else "", *figures])
                marks.append(" *" if index == self.kept_step else "")
                figures = [""] * len(figures)  # once for each step
        return f"{format_table(['removed', 'step', 'bits', 'score', *metrics], rows, marks=marks)}\n\n{self._outcome()}"

    def _outcome(self) -> str:
        """Return the line that sums up the run."""
        dense, kept = self.steps[0], self.steps[self.kept_step]
        activations = plural(len(dense.layer_entropy), "activation")
        return (
            f"{len(self.removed)} of {activations} removed up to step {self.kept_step} (*): score {kept.score:.4f}, "
            f"{dense.score:.4f} before"
        )


def _changes(step: Step) -> list[str]:
    """Return what a step removed: the names of activations, and how many neurons of others lost theirs."""
    changes = list(step.removed)
    if others := [site for name, site in step.neurons.items() if name not in step.removed]:
        neurons = sum(len(site.linear) + len(site.constant) for site in others)
        changes.append(f"{plural(neurons, 'neuron')} of {plural(len(others), 'activation')}")
    return changes or ["(nothing)"]
