"""The compiler behind torch.compile: what compiles the frames of a thread, and the backends that it hands graphs to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch

from fastentropy._compat.frames import Compiler, compiling, run_as_it_is
from fastentropy._compat.lookup import attribute, named

#: A backend of torch.compile: (graph, example inputs) -> function that runs the graph.
Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]


class UncountableGraphError(Exception):
    """The calls of activations in a graph cannot be counted. The message says why."""


def wrapper_class() -> type[torch.nn.Module]:
    """Return the class of the modules that torch.compile makes of modules."""
    kind: type[torch.nn.Module] = named("torch._dynamo", "OptimizedModule")
    return kind


def choose_compilers(choose: Callable[[Compiler], Compiler]) -> Callable[[], None]:
    """Let `choose` decide what compiles a function of torch.compile, each time that it is called.

    Args:
        choose: a function that is given what would compile the function under the stance of the user, and returns what does.

    Returns:
        A function that ends this.
    """
    eval_frame = named("torch._dynamo", "eval_frame")
    by_stance = attribute(eval_frame, "_callback_from_stance")

    def chosen(compiler: Compiler) -> Compiler:
        by_user: Compiler = by_stance(compiler)
        return None if by_user is None else choose(by_user)

    def end() -> None:
        if eval_frame._callback_from_stance is chosen:
            eval_frame._callback_from_stance = by_stance

    eval_frame._callback_from_stance = chosen
    return end


def take_for_plain(name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Let code that is compiled from now on be the same as if `call` were a method of nn.Module itself.

    Args:
        name: "__call__" or "_call_impl", in whose place `call` is.
        call: the function in its place.

    Returns:
        A function that ends this.
    """
    modules: Any = named("torch._dynamo.variables", "nn_module")
    known = {"__call__": "unpatched_nn_module_call", "_call_impl": "unpatched_nn_module_call_impl"}[name]
    plain = attribute(modules, known)
    setattr(modules, known, call)
    return lambda: setattr(modules, known, plain)


def backend_of(compiler: Compiler) -> Backend | None:
    """Return the backend that graphs are handed to; None if there is none that could be replaced, by the stance of the user."""
    if not isinstance(compiler, named("torch._dynamo.convert_frame", "CatchErrorsWrapper")):
        return None
    backend: Backend = named("torch._dynamo.eval_frame", "innermost_backend")(compiler)
    return backend


class CompilerWith:
    """A compiler that hands its graphs to another backend. Where that refuses a graph, the frame runs as it is.

    Dynamo keeps the code that it compiles for two backends apart, so the code of the original compiler stays as it is.
    """

    def __init__(self, compiler: Any, backend: Backend, refused: Callable[[CodeType, UncountableGraphError], None]) -> None:
        """Take the place of a compiler, of which `backend_of` returns the backend.

        Args:
            compiler: the compiler.
            backend: the other backend. It raises UncountableGraphError where it refuses a graph.
            refused: a function that is told the code of a frame whose graph was refused, and why.
        """
        self._original, self._backend, self._refused = compiler, backend, refused
        convert = attribute(attribute(compiler, "_torchdynamo_orig_backend"), "_clone_with_backend")(backend)
        self._torchdynamo_orig_backend = type(compiler)(convert, attribute(compiler, "hooks"))
        self._as_it_is: set[CodeType] = set()

    def __call__(self, frame: FrameType, *args: Any) -> Any:
        """Compile a frame, or let it run as it is."""
        if frame.f_code in self._as_it_is:
            return _as_it_is_once()
        try:
            with compiling():
                return self._torchdynamo_orig_backend(frame, *args)
        except Exception as error:
            if (reason := _refusal(error)) is None:
                raise
            self._as_it_is.add(frame.f_code)
            self._refused(frame.f_code, reason)
            return _as_it_is_once()


def _refusal(error: BaseException) -> UncountableGraphError | None:
    """Return the refusal of a backend, which Dynamo wraps in errors of its own; None if an error has another cause."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, UncountableGraphError):
        inner = getattr(inner, "inner_exception", None)
    return inner


def _as_it_is_once() -> Any:
    """Return what lets a frame, and all that it calls, run as it is this time."""
    run_as_it_is()
    types = "torch._dynamo.types"
    skip = named(types, "FrameAction").SKIP
    strategy = named(types, "FrameExecStrategy")(skip, skip)
    return named(types, "ConvertFrameReturn")(frame_exec_strategy=strategy, apply_to_code=False)


def own_graph(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a copy of a graph that may be changed. Dynamo goes on reading its own."""
    graph, copies = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
    result = graph.graph_copy(graph_module.graph, copies)
    output = graph.output(result)
    output.meta = dict(graph_module.graph.output_node().meta)
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    own = torch.fx.GraphModule(graph_module, graph)
    own.meta = dict(graph_module.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason", "_backend_id"):
        if hasattr(graph_module, name):
            setattr(own, name, getattr(graph_module, name))
    return own


def without_functions_of_modes() -> AbstractContextManager[object]:
    """Return a context in which no TorchFunctionMode sees what compiled code calls."""
    context: AbstractContextManager[object] = named("torch._C", "DisableTorchFunction")()
    return context


def for_counting(is_on_cuda: bool) -> AbstractContextManager[object]:
    """Return a context in which Inductor compiles sums of counts exactly, and joins them with what computes their input."""
    if not is_on_cuda:
        return nullcontext()
    # Row and column reductions in one kernel add up padded rows, and integers in float32 (pytorch#195845).
    options = {"triton.mix_order_reduction": False, "realize_reads_threshold": 20}
    context: AbstractContextManager[object] = named("torch._inductor", "config").patch(options)
    return context


def is_fake(x: Any) -> bool:
    """Return whether a value is a tensor of a tracer, which has no values."""
    return isinstance(x, named("torch._subclasses", "FakeTensor"))
