"""Let the trainers of other libraries tell a monitor of their steps. The libraries are imported on use."""

import importlib
from typing import Any, Protocol


class Steps(Protocol):
    """What a callback tells a monitor; see `EntropyMonitor`."""

    def begin_step(self, number: int) -> None:
        """Tell that a step begins, or goes on after a pause."""

    def pause_step(self) -> None:
        """Tell that passes which now follow do not belong to the step."""

    def end_step(self) -> dict[str, float] | None:
        """Tell that a step is complete, and return its figures, or None if it was not measured."""

    def cancel_step(self) -> None:
        """Tell that the step will not be completed."""


class _HuggingFaceEvents:
    """The events of `transformers.TrainerCallback` that a monitor is told of.

    A step has all micro-batches of an update. Evaluation runs between the steps. A run that raises tells no callback, so what
    it has left is cleared when the next one begins.
    """

    def __init__(self, steps: Steps) -> None:
        """Tell `steps`."""
        self._steps = steps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Clear what a run that raised has left."""
        self._steps.cancel_step()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a step, whose number is that of the updates before it."""
        self._steps.begin_step(state.global_step)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End a step."""
        self._steps.end_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Clear what is left of a step that was not completed."""
        self._steps.cancel_step()


class _LightningEvents:
    """The events of `lightning.pytorch.Callback` that a monitor is told of. The figures also go to the trainer's loggers.

    Where gradients are accumulated, validation may run between the batches of a step. So each batch goes on with the step and
    pauses it again, until the trainer counts another update.
    """

    def __init__(self, steps: Steps) -> None:
        """Tell `steps`."""
        self._steps, self._number = steps, 0

    def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Begin a step, whose number is that of the updates before it, or go on with it."""
        self._number = trainer.global_step
        self._steps.begin_step(self._number)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """End the step, or pause it until its next batch."""
        if trainer.global_step == self._number:
            self._steps.pause_step()
        elif figures := self._steps.end_step():
            for logger in trainer.loggers:
                logger.log_metrics(figures, self._number)

    def on_exception(self, *_: Any, **__: Any) -> None:
        """Clear what is left of the step that raised."""
        self._steps.cancel_step()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Clear what is left of a step that was not completed."""
        self._steps.cancel_step()


def huggingface_callback(steps: Steps) -> Any:
    """Return a `transformers.TrainerCallback` that tells `steps` of the steps of a Trainer. See `EntropyMonitor`."""
    return _callback(_HuggingFaceEvents, "transformers", "TrainerCallback")(steps)


def lightning_callback(steps: Steps) -> Any:
    """Return a `lightning.pytorch.Callback` that tells `steps` of the steps of a Trainer. See `EntropyMonitor`."""
    return _callback(_LightningEvents, "lightning.pytorch", "Callback")(steps)


def _callback(events: type, module: str, base: str) -> type:
    """Return a class with the methods of `events`, and all others from a base class in a module of another library."""
    library = module.partition(".")[0]
    try:
        parent = getattr(importlib.import_module(module), base)
    except ImportError as error:
        raise ImportError(f"this callback needs {library}: pip install {library}") from error
    return type("EntropyMonitorCallback", (events, parent), {})
