"""What an observer of a model's activation calls does, and an observer that records nothing."""

from typing import Any, Protocol, TypeVar

from fastentropy._compat import Compiler
from fastentropy.sites.compiled_calls import run_eagerly
from fastentropy.sites.graphs import GraphReader
from fastentropy.sites.site import Call

P = TypeVar("P")


class Observer(Protocol[P]):
    """Receive the forward passes of a model.

    `run_activation` and `end_pass` are given, as `forward_pass`, the value that `begin_pass` returned.
    """

    def begin_pass(self) -> P:
        """Prepare for a pass, which begins when the model, or a part of it, is called from outside."""
        ...

    def run_activation(self, forward_pass: P, call: Call) -> Any:
        """Run an activation and return its output. The observer may read the input before or after it runs the activation."""
        ...

    def choose_compiler(self, forward_pass: P, graphs: GraphReader, compiler: Compiler) -> Compiler:
        """Return what compiles a function of torch.compile in a pass.

        Args:
            forward_pass: the pass.
            graphs: what finds the sites of its graphs.
            compiler: what compiles the function while no watcher is attached.
        """
        ...

    def end_pass(self, forward_pass: P, completed: bool) -> None:
        """Finish a pass. `completed` is True if the call returned, and False if it raised."""
        ...


class NoObserver:
    """An observer that runs every activation and records nothing. Use it to discover sites."""

    def begin_pass(self) -> None:
        """Do nothing: no state is kept for a pass."""

    def run_activation(self, forward_pass: None, call: Call) -> Any:
        """Run the activation and return its output."""
        return call.run()

    def choose_compiler(self, forward_pass: None, graphs: GraphReader, compiler: Compiler) -> Compiler:
        """Return None: compiled functions run as they are, so that activations are called."""
        run_eagerly(compiler)
        return None

    def end_pass(self, forward_pass: None, completed: bool) -> None:
        """Do nothing, because no state was kept for the pass."""
