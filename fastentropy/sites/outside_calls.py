"""Compile functions of torch.compile that are called outside of passes, where nothing in them could be counted."""

import weakref
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, fx, nn

from fastentropy._compat import (
    Backend,
    Compiler,
    CompilerWith,
    UncountableGraphError,
    backend_of,
    bodies,
    identity_in_stack,
    module_being_compiled,
    roots_of_modules,
    without_intercepting,
)
from fastentropy.sites.activations import called_name, function_name, registered_in_python
from fastentropy.sites.kept_compilers import KeptCompilers


class _PlainBackend:
    """Let the backend of the user compile graphs in which nothing could be counted, and refuse others.

    A refused function runs as it is: it may call a model, which begins a pass.
    """

    def __init__(self, inner: Backend, of_modules: bool) -> None:
        """Begin without graphs.

        Args:
            inner: the backend of the user.
            of_modules: whether it compiles methods of modules that nobody watches. All other modules are refused, since what
                was compiled for one module is also used for others of its class.
        """
        self.inner, self.of_modules = inner, of_modules
        self.__name__ = getattr(inner, "__name__", type(inner).__name__)

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph of Dynamo.

        Raises:
            UncountableGraphError: the graph has modules or activations that may be watched.
        """
        module = module_being_compiled() if self.of_modules else None
        if self.of_modules and len(roots_of_modules()) > 1:  # such a module may be another one next time, or have other methods
            raise UncountableGraphError("it calls modules outside of forward passes")
        unwatched = {id(each) for each in module.modules()} if module is not None else set[int]()
        _check(graph_module.graph, unwatched if self.of_modules else None)
        compiled = self.inner(graph_module, inputs)

        def run(*args: Any) -> Any:
            with without_intercepting():
                return compiled(*args)

        return run


def _check(graph: fx.Graph, unwatched: Collection[int] | None) -> None:
    """Raise for a graph that has modules or activations that may be watched.

    Args:
        graph: the graph.
        unwatched: the identities of modules that are not, if the graph is the code of one of them; otherwise None.
    """
    for node in graph.nodes:
        function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
        running = {identity_in_stack(key) for key in node.meta.get("nn_module_stack") or ()}
        if node.op == "call_module" or not running.issubset(unwatched or ()):
            raise UncountableGraphError("it calls modules outside of forward passes")
        if unwatched is None and callable(function) and (function_name(function) or called_name(function)):
            raise UncountableGraphError("it calls activations outside of forward passes")
        for body in bodies(node):
            _check(body.graph, unwatched)


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

    def known(self, compiler: Compiler, unwatched: nn.Module | None) -> CompilerWith | None:
        """Return what has compiled a function outside of passes in place of `compiler`; None if nothing has.

        The arguments are as in `choose`.
        """
        if isinstance(compiler, CompilerWith):  # between two graphs
            kept = (self._compilers.known(compiler.original, of_modules) for of_modules in (False, True))
            return next((each for each in kept if each is compiler), None)
        return self._compilers.known(compiler, unwatched is not None)

    def choose(self, compiler: Compiler, unwatched: nn.Module | None) -> Compiler:
        """Return what compiles a function outside of passes; None if the function runs as it is.

        Args:
            compiler: the compiler of the user.
            unwatched: the module of which the function is a method, if neither it nor any module in it is watched.
        """
        known = self.known(compiler, unwatched)
        of_modules = unwatched is not None or (known is not None and getattr(known.backend, "of_modules", False))
        if not of_modules and (hidden := registered_in_python()):
            self._note(f"compiled code outside of forward passes runs eagerly: its graphs do not show calls of {hidden[0]}")
            return None
        if known is not None or isinstance(compiler, CompilerWith):
            return known
        inner = backend_of(compiler)
        if inner is None:
            self._note("compiled code outside of forward passes runs eagerly: the stance of torch.compiler compiles nothing")
            return None
        return self._compilers.keep(compiler, _backend(inner, unwatched is not None), unwatched is not None)

    def _refused(self, name: str, error: UncountableGraphError) -> None:
        """Note that some code runs eagerly."""
        self._note(f"the compiled code of {name} runs eagerly: {error}")


def _backend(inner: Backend, of_modules: bool) -> _PlainBackend:
    """Return a backend with the backend of the user behind it. Dynamo knows the code that it has compiled."""
    for known in list(_BACKENDS):
        if known.of_modules == of_modules and (known.inner is inner or known.inner == inner):
            return known
    backend = _PlainBackend(inner, of_modules)
    _BACKENDS.add(backend)
    return backend
