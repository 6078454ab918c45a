"""What an observer of a model's activation calls does, and an observer that records nothing."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from fastentropy._compat import Compiler
from fastentropy.sites.graphs import GraphReader
from fastentropy.sites.site import Call

P = TypeVar("P")

#: What `run_repeated` returns if it has not run the activation.
NOT_RUN = object()


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

    def run_repeated(
        self,
        forward_pass: P,
        name: str,
        activation: str,
        x: Tensor,
        module: nn.Module | None,
        run: Callable[[], Any],
    ) -> Any:
        """Run an activation without looking its site up, if the site had such a call before. No padding mask applies.

        Args:
            forward_pass: the pass.
            name: the name of the site.
            activation: the name of the activation.
            x: its input.
            module: the activation module; None if a function is called.
            run: runs the activation and returns its output.

        Returns:
            The output; NOT_RUN if the call is not known to be like an earlier one.
        """
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

    def run_repeated(
        self, forward_pass: None, name: str, activation: str, x: Tensor, module: nn.Module | None, run: Callable[[], Any]
    ) -> Any:
        """Return NOT_RUN: every call is of interest."""
        return NOT_RUN

    def choose_compiler(self, forward_pass: None, graphs: GraphReader, compiler: Compiler) -> Compiler:
        """Return None: compiled functions run as they are, so that activations are called."""
        return None

    def end_pass(self, forward_pass: None, completed: bool) -> None:
        """Do nothing, because no state was kept for the pass."""
