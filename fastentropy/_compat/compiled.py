"""The compiler behind torch.compile: what compiles the frames of a thread, and the backends that it hands graphs to."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch

from fastentropy._compat.frames import Compiler, compiling, run_as_it_is
from fastentropy._compat.lookup import attribute, named

#: A backend of torch.compile: (graph, example inputs) -> function that runs the graph.
Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]


class UncountableGraphError(Exception):
    """The calls of activations in a graph cannot be counted. The message says why."""


class UnknownSiteError(UncountableGraphError):
    """A graph calls an activation for the first time. It is known once the code has run as it is."""


#: How often a frame is traced again although its graph had unknown sites.
_ATTEMPTS = 3
#: How the name of a registered submodule ends.
_REGISTERED = re.compile(r"(\._modules\['[^']*'\])*$")
#: No local variable of a frame has this name.
_OF_NO_FRAME = "<none>"


def wrapper_class() -> type[torch.nn.Module]:
    """Return the class of the modules that torch.compile makes of modules."""
    kind: type[torch.nn.Module] = named("torch._dynamo", "OptimizedModule")
    return kind


def choose_compilers(choose: Callable[[Compiler, FrameType], Compiler]) -> Callable[[], None]:
    """Let `choose` decide what compiles a function of torch.compile, each time that it is called.

    Args:
        choose: a function that is given what would compile the function under the stance of the user, and the frame that calls
            the function, for `called_module`. It returns what compiles the function.

    Returns:
        A function that ends this.
    """
    eval_frame = named("torch._dynamo", "eval_frame")
    by_stance = attribute(eval_frame, "_callback_from_stance")

    def chosen(compiler: Compiler) -> Compiler:
        by_user: Compiler = by_stance(compiler)
        return None if by_user is None else choose(by_user, sys._getframe(1))

    def end() -> None:
        if eval_frame._callback_from_stance is chosen:
            eval_frame._callback_from_stance = by_stance

    eval_frame._callback_from_stance = chosen
    return end


def called_module(frame: FrameType) -> torch.nn.Module | None:
    """Return the module of which the wrapper that torch.compile makes, and that runs in a frame, calls a method.

    Returns None if it calls another function, or other code runs in the frame.
    """
    function = frame.f_locals.get("fn") if frame.f_code.co_name == "compile_wrapper" else None
    if not hasattr(function, "__self__"):  # PyTorch wraps its own modules and their forwards
        function = getattr(function, "__wrapped__", None)
    module = function if isinstance(function, torch.nn.Module) else getattr(function, "__self__", None)
    return module if isinstance(module, torch.nn.Module) else None


def module_being_compiled() -> torch.nn.Module | None:
    """Return the module of which torch.compile is compiling a method in this thread; None if it is not known to be one.

    This is also known for the code between two graphs of it, after other compiled code has run there.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        frame = frame.f_back
    return None if frame is None else called_module(frame)


def roots_of_modules() -> set[str]:
    """Return how the code that is being compiled in this thread reaches modules, without what is registered in these.

    An example is `{"L['self']", "L['self'].models[0]"}`, where `L` holds the local variables.
    """
    guards = attribute(named("torch._guards", "TracingContext").get(), "guards_context").dynamo_guards
    modules = (each for each in guards if type(attribute(each, "originating_source")).__name__.endswith("NNModuleSource"))
    return {_REGISTERED.sub("", attribute(each, "name")) for each in modules}


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


class Refusals:
    """The code that a backend refuses to compile. Its frames run as they are.

    They belong to the backend, since PyTorch makes another compiler for each call under `set_stance(force_backend=…)`.
    """

    def __init__(self, refused: Callable[[str, UncountableGraphError], None]) -> None:
        """Begin without refusals. `refused` is told the name of the code whose graph was refused, and why."""
        self._refused = refused
        self._attempts: dict[CodeType, int] = {}
        self.codes: set[CodeType] = set()

    def add(self, code: CodeType, reason: UncountableGraphError) -> None:
        """Let frames with a code run as they are from now on. If a site was not known yet, this holds for this time only."""
        attempts = self._attempts[code] = self._attempts.get(code, 0) + 1
        if not isinstance(reason, UnknownSiteError) or attempts == _ATTEMPTS:
            self.codes.add(code)
            self._refused(getattr(code, "co_qualname", code.co_name), reason)  # co_qualname is new in Python 3.11


class CompilerWith:
    """A compiler that hands its graphs to another backend. Where that refuses a graph, the frame runs as it is.

    Dynamo keeps the code that it compiles for two backends apart, so the code of the original compiler stays as it is. To the
    limit of recompilations each counts for itself.
    """

    def __init__(self, compiler: Any, backend: Backend, refusals: Refusals) -> None:
        """Take the place of a compiler, of which `backend_of` returns the backend.

        Args:
            compiler: the compiler.
            backend: the other backend. It raises UncountableGraphError where it refuses a graph.
            refusals: the code that this backend has refused before.
        """
        self.original, self.backend, self._refusals = compiler, backend, refusals
        convert = attribute(attribute(compiler, "_torchdynamo_orig_backend"), "_clone_with_backend")(backend)
        self._torchdynamo_orig_backend = type(compiler)(convert, attribute(compiler, "hooks"))

    def __call__(self, frame: FrameType, *args: Any) -> Any:
        """Compile a frame, or let it run as it is."""
        if frame.f_code in self._refusals.codes:
            return _as_it_is_once()
        try:
            with compiling(), _counted_alone(frame.f_code, self.backend):
                compiled = self._torchdynamo_orig_backend(frame, *args)
        except Exception as error:
            if (reason := _refusal(error)) is None:
                raise
            self._refusals.add(frame.f_code, reason)
            return _as_it_is_once()
        if _gives_up(compiled):  # at the limit of recompilations, for this backend alone
            self._refusals.codes.add(frame.f_code)
            return _as_it_is_once()
        if (code := attribute(compiled, "guarded_code")) is not None:
            _set_counted(False, [attribute(code, "guard_manager")])
        return compiled


def _refusal(error: BaseException) -> UncountableGraphError | None:
    """Return the refusal of a backend, which Dynamo wraps in errors of its own; None if an error has another cause."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, UncountableGraphError):
        inner = getattr(inner, "inner_exception", None)
    return inner


@contextmanager
def _counted_alone(code: CodeType, backend: Backend) -> Iterator[None]:
    """Let only what a code was compiled to for a backend count to the limit of recompilations, inside of the block.

    Afterwards it does not count any more, so that the compilers of the user have all of the limit.
    """
    with named("torch._dynamo.convert_frame", "compile_lock"):
        own, others = list[Any](), list[Any]()
        for entry in named("torch._dynamo.eval_frame", "_debug_get_cache_entry_list")(code):
            manager = attribute(entry, "guard_manager")
            if attribute(entry, "backend") is backend:
                own.append(manager)
            elif _is_counted(manager):
                others.append(manager)
        try:
            _set_counted(True, own)
            _set_counted(False, others)
            yield
        finally:
            _set_counted(False, own)
            _set_counted(True, others)


def _is_counted(guard_manager: Any) -> bool:
    """Return whether compiled code counts to the limit of recompilations."""
    return _OF_NO_FRAME not in attribute(guard_manager, "id_matched_objs")


def _set_counted(is_counted: bool, guard_managers: Sequence[Any]) -> None:
    """Let compiled codes count to the limit of recompilations, or not.

    Dynamo does not count code that was compiled for other objects than those of the frame, by the names of local variables.
    """
    for each in guard_managers:
        objects = attribute(each, "id_matched_objs")
        if is_counted:
            objects.pop(_OF_NO_FRAME, None)
        else:
            objects[_OF_NO_FRAME] = weakref.ref(_counted_alone)  # an object that lives as long as the process


def _gives_up(compiled: Any) -> bool:
    """Return whether Dynamo is going to compile a code no more."""
    action = attribute(compiled, "frame_exec_strategy").cur_action
    return bool(action == named("torch._dynamo.types", "FrameAction").RUN_ONLY)


def _as_it_is_once() -> Any:
    """Return what lets a frame, and all that it calls, run as it is this time."""
    run_as_it_is()
    types = "torch._dynamo.types"
    skip = named(types, "FrameAction").SKIP
    strategy = named(types, "FrameExecStrategy")(skip, skip)
    return named(types, "ConvertFrameReturn")(frame_exec_strategy=strategy, apply_to_code=False)


def without_functions_of_modes() -> AbstractContextManager[object]:
    """Return a context in which no TorchFunctionMode sees what compiled code calls."""
    context: AbstractContextManager[object] = named("torch._C", "DisableTorchFunction")()
    return context


def for_counting(is_on_cuda: bool) -> AbstractContextManager[object]:
    """Return a context in which Inductor compiles sums of counts exactly, and joins them with what computes their input."""
    # Above the thresholds Inductor would write the input of the activation to memory and read it again, in place of counting it
    # where it is computed. With the operations of batch norm, a count has more than 30.
    options: dict[str, object] = {"realize_reads_threshold": 20, "realize_opcount_threshold": 100}
    if is_on_cuda:
        # Row and column reductions in one kernel add up padded rows, and integers in float32 (pytorch#195845).
        options["triton.mix_order_reduction"] = False
    context: AbstractContextManager[object] = named("torch._inductor", "config").patch(options)
    return context
