"""Compile functions of torch.compile that are called outside of passes, where nothing in them is counted."""

import weakref
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

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

#: What is compiled outside of passes: "functions" without modules and activations; "methods" of modules that nobody watches,
#: without other modules, since what was compiled for one module is also used for others of its class; all that runs in a
#: "backward" pass.
Scope = Literal["functions", "methods", "backward"]


class _PlainBackend:
    """Let the backend of the user compile graphs in which nothing is counted, and refuse others.

    A refused function runs as it is: it may call a model, which begins a pass.
    """

    def __init__(self, inner: Backend, scope: Scope) -> None:
        """Begin without graphs. `inner` is the backend of the user."""
        self.inner, self.scope = inner, scope
        self.__name__ = getattr(inner, "__name__", type(inner).__name__)

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph of Dynamo.

        Raises:
            UncountableGraphError: the graph has modules or activations that may be watched.
        """
        if self.scope == "methods":
            _check_of_method(graph_module.graph)
        elif self.scope == "functions":
            _check(graph_module.graph, None)
        compiled = self.inner(graph_module, inputs)

        def run(*args: Any) -> Any:
            with without_intercepting():
                return compiled(*args)

        return run


def _check_of_method(graph: fx.Graph) -> None:
    """Raise for a graph that has other modules than the one that is being compiled, and those in it."""
    module = module_being_compiled()
    if len(roots_of_modules()) > 1:  # such a module may be another one next time, or have other methods
        raise UncountableGraphError("it calls modules outside of forward passes")
    _check(graph, set() if module is None else {id(each) for each in module.modules()})


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
            kept = (self._compilers.known(compiler.original, scope) for scope in get_args(Scope))
            return next((each for each in kept if each is compiler), None)
        return self._compilers.known(compiler, _scope(unwatched))

    def choose(self, compiler: Compiler, unwatched: nn.Module | None) -> Compiler:
        """Return what compiles a function outside of passes; None if the function runs as it is.

        Args:
            compiler: the compiler of the user.
            unwatched: the module of which the function is a method, if neither it nor any module in it is watched.
        """
        known = self.known(compiler, unwatched)
        is_method = unwatched is not None or (known is not None and getattr(known.backend, "scope", "") == "methods")
        if not is_method and (hidden := registered_in_python()):
            self._note(f"compiled code outside of forward passes runs eagerly: its graphs do not show calls of {hidden[0]}")
            return None
        if known is not None or isinstance(compiler, CompilerWith):
            return known
        inner = backend_of(compiler)
        if inner is None:
            self._note("compiled code outside of forward passes runs eagerly: the stance of torch.compiler compiles nothing")
            return None
        return self._keep(compiler, inner, _scope(unwatched))

    def for_backward(self, compiler: Compiler) -> Compiler:
        """Return what compiles, without counts, a function that a backward pass calls. The argument is as in `choose`."""
        known, inner = self._compilers.known(compiler, "backward"), backend_of(compiler)
        return known or (compiler if inner is None else self._keep(compiler, inner, "backward"))

    def _keep(self, compiler: Compiler, inner: Backend, scope: Scope) -> CompilerWith:
        """Make a compiler that takes the place of another one, whose backend is `inner`, and keep it."""
        return self._compilers.keep(compiler, _backend(inner, scope), scope)

    def _refused(self, name: str, error: UncountableGraphError) -> None:
        """Note that some code runs eagerly."""
        self._note(f"the compiled code of {name} runs eagerly: {error}")


def _scope(unwatched: nn.Module | None) -> Scope:
    """Return what is compiled for a function; the argument is as in `OutsideCompilers.choose`."""
    return "functions" if unwatched is None else "methods"


def _backend(inner: Backend, scope: Scope) -> _PlainBackend:
    """Return a backend with the backend of the user behind it. Dynamo knows the code that it has compiled."""
    for known in list(_BACKENDS):
        if known.scope == scope and (known.inner is inner or known.inner == inner):
            return known
    backend = _PlainBackend(inner, scope)
    _BACKENDS.add(backend)
    return backend
