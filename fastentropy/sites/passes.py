"""What a watcher knows of the forward pass that a thread is in."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.modules import output_axis
from fastentropy.sites.naming import PassNames

P = TypeVar("P")


class Produced:
    """The module that returned last, which presumably computed the input of the next activation.

    Attributes:
        path: the path of the module; None if none is known.
    """

    __slots__ = ("_module", "_y", "path")

    def __init__(self) -> None:
        """Begin with nothing known."""
        self.path: str | None = None
        self._module: nn.Module | None = None
        self._y: weakref.ref[Tensor] | None = None

    def set(self, path: str, module: nn.Module, y: Any) -> None:
        """Note that a module has returned `y`. It is held weakly."""
        self.path, self._module = path, module
        self._y = weakref.ref(y) if isinstance(y, Tensor) else None

    def returned(self, x: object) -> bool:
        """Return whether `x` is what the module returned."""
        return x is not None and self._y is not None and self._y() is x

    def channel_axis(self, x: Tensor) -> tuple[int | None, bool]:
        """Return the channel axis of `x` by the class of the module, and whether `x` is what the module returned.

        If `x` is another tensor of the same shape, such as a sum with a residual, the axis is likely but not certain. None if
        nothing is known.
        """
        y = self._y() if self._y is not None else None
        if self._module is None or y is None or y.shape != x.shape:
            return None, False
        return output_axis(self._module, y), y is x

    def for_path(self, path: str) -> str | None:
        """Return the path of the module; None if the activation at `path` is a part of it, so that it did not run before it."""
        producer = self.path
        if producer and not (path.startswith(producer) and path.startswith(f"{producer}.")):
            return producer
        return None


@dataclass
class Pass(Generic[P]):
    """A forward pass in one thread: the outermost call of the model, or of a part of it."""

    entry: str  # the path of the module that is called from outside
    observed: P  # the value that the observer's begin_pass returned
    tracker: AxisTracker | None  # None if operators are not followed in this pass
    produced: Produced
    names: PassNames = field(default_factory=PassNames)
    owners: list[str] = field(default_factory=list)  # paths of the modules whose forwards are running, outermost first
    is_token: Tensor | None = None  # the padding mask that applies, bool [batch, tokens]
    given_mask: Any = None  # the argument that it comes from
    inside_activation: bool = False  # whether an activation is running
    learns_masks: bool = False  # whether compiled code runs as it is, to find out which mask applies where
    is_compiled: bool = False  # whether it runs functions of torch.compile, as they are or compiled


class ThreadState(threading.local, Generic[P]):
    """What a watcher knows of a thread."""

    def __init__(self) -> None:
        """Begin outside of any pass."""
        self.current: Pass[P] | None = None
        self.tracker: AxisTracker | None = None  # shared by the passes in which operators are followed
        self.produced = Produced()  # by modules that are called from outside
        self.owner = ""  # outside of passes: the path of the module of which a method calls an activation
