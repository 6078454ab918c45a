"""Compile functions of torch.compile that are called outside of passes, where nothing in them could be counted."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fastentropy._compat import Backend, Compiler, CompilerWith, UncountableGraphError, backend_of, bodies, without_intercepting
from fastentropy.sites.activations import called_name, function_name, registered_in_python
from fastentropy.sites.kept_compilers import KeptCompilers


class _PlainBackend:
    """Let the backend of the user compile graphs without modules and activations, and refuse others.

    A refused function runs as it is: it may call a model, which begins a pass.
    """

    def __init__(self, inner: Backend) -> None:
        """Begin without graphs. `inner` is the backend of the user."""
        self.inner = inner
        self.__name__ = getattr(inner, "__name__", type(inner).__name__)

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph of Dynamo.

        Raises:
            UncountableGraphError: the graph has modules or activations.
        """
        _check(graph_module.graph)
        compiled = self.inner(graph_module, inputs)

        def run(*args: Any) -> Any:
            with without_intercepting():
                return compiled(*args)

        return run


def _check(graph: fx.Graph) -> None:
    """Raise for a graph that has modules or activations."""
    for node in graph.nodes:
        function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
        if node.op == "call_module" or node.meta.get("nn_module_stack"):
            raise UncountableGraphError("it calls modules outside of forward passes")
        if callable(function) and (function_name(function) or called_name(function)):
            raise UncountableGraphError("it calls activations outside of forward passes")
        for body in bodies(node):
            _check(body.graph)


#: The backends that were made. Dynamo keeps each as long as code that it has compiled, so nothing is compiled again later.
_BACKENDS: "weakref.WeakSet[_PlainBackend]" = weakref.WeakSet()


class OutsideCompilers:
    """The compilers of functions that are called outside of passes, each in place of a compiler of the user."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """Begin without compilers. `note` is given a sentence about code that runs eagerly."""
        self._note = note
        self.forget()

    def forget(self) -> None:
        """Forget the compilers, and what their backends have refused."""
        self._compilers = KeptCompilers(self._refused)

    def known(self, compiler: Compiler) -> CompilerWith | None:
        """Return what has compiled a function outside of passes in place of `compiler`; None if nothing has."""
        original = compiler.original if isinstance(compiler, CompilerWith) else compiler
        known = self._compilers.known(original)
        return known if compiler is original or compiler is known else None

    def choose(self, compiler: Compiler) -> Compiler:
        """Return what compiles a function outside of passes; None if the function runs as it is."""
        if hidden := registered_in_python():
            self._note(f"compiled code outside of forward passes runs eagerly: its graphs do not show calls of {hidden[0]}")
            return None
        known = self.known(compiler)
        if known is not None or isinstance(compiler, CompilerWith):
            return known
        inner = backend_of(compiler)
        if inner is None:
            self._note("compiled code outside of forward passes runs eagerly: the stance of torch.compiler compiles nothing")
            return None
        return self._compilers.keep(compiler, _backend(inner))

    def _refused(self, name: str, error: UncountableGraphError) -> None:
        """Note that some code runs eagerly."""
        self._note(f"the compiled code of {name} runs eagerly: {error}")


def _backend(inner: Backend) -> _PlainBackend:
    """Return a backend with the backend of the user behind it. Dynamo knows the code that it has compiled."""
    for known in list(_BACKENDS):
        if known.inner is inner or known.inner == inner:
            return known
    backend = _PlainBackend(inner)
    _BACKENDS.add(backend)
    return backend
