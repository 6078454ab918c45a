"""Measure a model's statistics every so many steps of its training."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from fastentropy.collector.api import collect
from fastentropy.collector.statistics import Statistics
from fastentropy.monitoring import callbacks
from fastentropy.monitoring.writers import Writer, figures_of


class EntropyMonitor:
    """Measure the entropy and the dead and always-on neurons of each site every so many steps of a training, and log them.

    Only in the steps that are measured a collector is attached, so the other steps run as without a monitor. The model is not
    changed. For a loop of your own there is `step`, for the trainers of other libraries `huggingface_callback` and
    `lightning_callback`; these call `begin_step`, `pause_step`, `end_step` and `cancel_step`, as you may, too.

    The number of a step is the number of updates of the weights before it. A step is measured if its number is a multiple of
    `every`, so the first is. In torch.distributed, make a monitor on every rank: the counts of all ranks are added up after
    each step that is measured, and rank 0 writes.

    Args:
        model: the model that is trained, or the part of it that is of interest.
        every: how many steps apart the measured ones are.
        writers: functions that are called after each step that is measured, with its figures and its number. The figures are a
            dict with a float for each key, `entropy/SITE` in bits, and `dead/SITE` and `always_on/SITE` as fractions of the
            neurons. There are `tensorboard_writer`, `json_lines_writer` and `wandb_writer`. The `log` of an Accelerator and
            `mlflow.log_metrics` are writers as they are.
        **options: options of `collect`, such as `exclude`.

    Attributes:
        every: as given.
        latest: the `Statistics` of the step that was measured last, or None.

    Raises:
        TypeError: `model` or one of the options has the wrong type.
        ValueError: `every` is below 1, or one of the options has an unknown value.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = fe.EntropyMonitor(model, every=50, writers=[lambda figures, step: print(step, list(figures))])
        >>> for _ in range(60):
        ...     with monitor.step():
        ...         model(torch.randn(8, 3)).square().mean().backward()
        ...         optimizer.step()
        0 ['entropy/1', 'dead/1', 'always_on/1']
        50 ['entropy/1', 'dead/1', 'always_on/1']
        >>> monitor.latest["1"].observations
        32
    """

    def __init__(self, model: nn.Module, *, every: int = 50, writers: Sequence[Writer] = (), **options: Any) -> None:
        """Prepare to measure. Nothing is attached yet."""
        if every < 1:
            raise ValueError(f"every={every}: expected a number of steps of at least 1, such as every=50")
        self.every = every
        self.latest: Statistics | None = None
        self._writers = tuple(writers)
        self._collector = collect(model, **options)
        self._is_attached = False
        self._measured: int | None = None  # the number of the step that is being measured
        self._next = 0

    @contextlib.contextmanager
    def step(self, number: int | None = None) -> Iterator[None]:
        """Measure the forward passes inside the block, if it is this step's turn.

        The block is one step of your loop: all batches whose gradients go into one update. Leave evaluation out of it, or it is
        counted. If the block raises, nothing is written, and the model is as it was before.

        Args:
            number: the number of the step, for example when training goes on from a checkpoint. By default, steps are counted
                from 0.

        Returns:
            A context manager for the block.

        Raises:
            RuntimeError: the model was not called in a step that is measured, or another collector is attached to it.
            ValueError: the model calls no known activation.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
            >>> monitor = fe.EntropyMonitor(model, every=10)
            >>> for number in range(1995, 2005):
            ...     with monitor.step(number):
            ...         y = model(torch.randn(8, 3))
            >>> monitor.latest
            <Statistics: 1 site, 4 neurons>
        """
        self.begin_step(self._next if number is None else number)
        try:
            yield
        except BaseException:
            self.cancel_step()
            raise
        self.end_step()

    def begin_step(self, number: int) -> None:
        """Begin a step, or go on with it after `pause_step`.

        Args:
            number: the number of the step.

        Raises:
            RuntimeError: another collector is attached to the model.
            ValueError: activations of the model are compiled by TorchScript.
        """
        self._next = number + 1
        if self._measured != number:
            self.cancel_step()
        if number % self.every == 0 and not self._is_attached:
            self._collector.attach()
            self._is_attached, self._measured = True, number

    def pause_step(self) -> None:
        """Leave the forward passes that follow out of the step, for example evaluation, until `begin_step` goes on with it."""
        if self._is_attached:
            self._collector.detach()
            self._is_attached = False

    def end_step(self) -> dict[str, float] | None:
        """End the step. If it was measured, its figures are written.

        Returns:
            The figures of the step, or None if it was not measured.

        Raises:
            RuntimeError: the model was not called in a step that is measured.
            ValueError: the model calls no known activation.
        """
        self.pause_step()
        number, self._measured = self._measured, None
        if number is None:
            return None
        try:
            # With nothing counted on any rank, `compute` raises and says why.
            statistics = self.latest = self._collector.sync() or self._collector.compute()
        finally:
            self._collector.reset()
        figures = figures_of(statistics)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            for write in self._writers:
                write(dict(figures), number)
        return figures

    def cancel_step(self) -> None:
        """End the step without writing, for example after an exception. The model is as it was before."""
        self.pause_step()
        if self._measured is not None:
            self._measured = None
            self._collector.reset()

    def __enter__(self) -> "EntropyMonitor":
        """Return the monitor."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Cancel the step that an exception has left, as it may with Hugging Face's Trainer."""
        self.cancel_step()

    def huggingface_callback(self) -> Any:
        """Return a callback for Hugging Face's Trainer.

        A step has all batches whose gradients are accumulated. Evaluation and prediction are not counted.

        If training raises, the Trainer tells its callbacks nothing of it. A collector may then stay attached until training
        begins anew. `with monitor: trainer.train()` detaches it in any case.

        Returns:
            A `transformers.TrainerCallback`.

        Raises:
            ImportError: transformers is not installed.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> monitor = fe.EntropyMonitor(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))
            >>> callbacks = [monitor.huggingface_callback()]  # for Trainer(model, arguments, callbacks=callbacks)
        """
        return callbacks.huggingface_callback(self)

    def lightning_callback(self) -> Any:
        """Return a callback for Lightning's Trainer. The figures also go to the loggers of the Trainer.

        A step has all batches whose gradients are accumulated. Sanity checks, validation, tests and predictions are left out.

        Returns:
            A `lightning.pytorch.Callback`.

        Raises:
            ImportError: lightning is not installed.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> monitor = fe.EntropyMonitor(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))
            >>> callbacks = [monitor.lightning_callback()]  # for lightning.Trainer(callbacks=callbacks)
        """
        return callbacks.lightning_callback(self)
