"""Let handlers run in place of the calls of a model's modules for a while, and change nothing that a module's user can see.

While any interception is attached, all calls of modules in the process pass through `_intercepted_call`, which looks the module
up in a table. The modules, their classes and their hooks stay as they are. A hook of the user would be seen; a subclass would
change `type(module)`, `super()` and the signature of the forward, which transformers, accelerate and others read.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from types import FrameType, FunctionType
from typing import Any, NamedTuple, cast

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from fastentropy._compat import (
    Compiler,
    compiled_call,
    current_compiler,
    is_compiled_here,
    is_replica,
    module_call,
    module_identity,
    never_compile,
    outer_module_call,
    replace_module_call,
    set_compiler,
    stack_frame,
    take_for_call_in_traces,
    take_for_plain,
    uncompiled,
    wrapper_class,
)
from fastentropy.sites.compiled_calls import begin_choosing, choose_compiler

#: A function that runs in place of a call of a module: (name, module, original call, args, kwargs) -> result. The original call
#: runs the module with its hooks: original(module, *args, **kwargs).
Handler = Callable[[str, nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
#: A function that is told of a module before it is put into a module that is intercepted: (name of the owner, name of the
#: attribute, new module).
Added = Callable[[str, str, nn.Module], None]


class _Entry(NamedTuple):
    """What the table holds for a module."""

    interception: "weakref.ref[Interception]"  # weak, so that a collector can be deleted without `detach`
    module: nn.Module
    name: str  # the name that the handler is given
    kind: str  # the key of the handler among the handlers of the interception


class Interception:
    """Let handlers run in place of the calls of modules while attached.

    A handler is run however the module is called: by its user, as a replica of nn.DataParallel, or inside of a compiled model.
    Copies of a module are modules of their own, which are not intercepted. The forward of a module that is called without the
    module, as `module.forward(x)`, is not seen.
    """

    def __init__(self, handlers: Mapping[str, Handler], added: Added) -> None:
        """Prepare to intercept modules. No module is intercepted yet.

        Args:
            handlers: the handlers, by the kind of the modules that they handle.
            added: the function that is told of modules that are put into intercepted modules while attached.
        """
        self.handlers, self.added = dict(handlers), added
        self._attached: _Attached | None = None

    @property
    def is_attached(self) -> bool:
        """Return whether modules are intercepted."""
        return self._attached is not None

    def attach(self, model: nn.Module, kinds: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Begin to intercept.

        Args:
            model: the model of which all modules are checked.
            kinds: for each name, a module and its kind.

        Raises:
            RuntimeError: the model or a part of it is intercepted already.
        """
        if any(_TABLE.is_intercepted(module) for module in model.modules()):
            raise RuntimeError("a collector is attached to this model already; detach it first")
        attached = self._attached = _Attached()
        weakref.finalize(self, attached.undo).atexit = False
        try:
            _TABLE.enter(attached)
            for name, (module, kind) in kinds.items():
                self.add(name, module, kind)
        except BaseException:
            self.detach()
            raise

    def add(self, name: str, module: nn.Module, kind: str) -> None:
        """Intercept another module while attached; see `attach`."""
        attached = self._attached
        if attached is not None:
            attached.add(module, _Entry(weakref.ref(self), module, name, kind))

    def remove(self, module: nn.Module) -> None:
        """Intercept a module no longer."""
        if self._attached is not None:
            self._attached.remove(module)

    def detach(self) -> None:
        """Intercept no longer."""
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.undo()


class _Attached:
    """The entries of one interception in the table, and how to undo them."""

    def __init__(self) -> None:
        """Begin without entries."""
        self._identities: set[int] = set()

    def add(self, module: nn.Module, entry: _Entry) -> None:
        """Enter a module into the table."""
        identity = module_identity(module)
        self._identities.add(identity)
        _TABLE.entries[identity] = entry
        if compiled_call(module) is not None:
            _TABLE.enter_call_of_compiled()

    def remove(self, module: nn.Module) -> None:
        """Take a module out of the table."""
        identity = module_identity(module)
        if identity in self._identities:
            self._identities.remove(identity)
            _TABLE.entries.pop(identity, None)

    def undo(self) -> None:
        """Take all entries out of the table. This also runs when an interception is deleted without `detach`."""
        for identity in self._identities:
            _TABLE.entries.pop(identity, None)
        self._identities.clear()
        _TABLE.leave(self)


class _Table:
    """The modules that are intercepted now, by their identity, and what must be in place while there are any."""

    def __init__(self) -> None:
        """Begin with nothing attached."""
        self.entries: dict[int, _Entry] = {}
        self.original: Callable[..., Any] = module_call()
        self.outer: Callable[..., Any] = nn.Module.__call__
        self._takes_outer_calls = False
        self.wrapper: type[nn.Module] | None = None  # the class of the modules that torch.compile makes of modules
        self._lock, self._attached = threading.RLock(), set[int]()
        self._in_place = contextlib.ExitStack()

    def is_intercepted(self, module: nn.Module) -> bool:
        """Return whether a module is intercepted."""
        return module_identity(module) in self.entries

    def enter(self, attached: _Attached) -> None:
        """Let calls of modules pass through the table from now on, and choose what compiles the code of each thread."""
        with self._lock:
            self._attached.add(id(attached))
            if len(self._attached) > 1:
                return
            with contextlib.ExitStack() as in_place:
                never_compile(*(function.__code__ for function in _OURS))
                self.wrapper = wrapper_class()
                in_place.callback(begin_choosing())
                in_place.callback(_hook_registrations().remove)
                self.original = module_call()
                functools.update_wrapper(_intercepted_call, self.original)
                replace_module_call(_intercepted_call)
                in_place.callback(self._restore_call)
                in_place.callback(take_for_plain("_call_impl", _intercepted_call))
                self._in_place = in_place.pop_all()

    def leave(self, attached: _Attached) -> None:
        """Restore the calls of modules, if nothing else is attached."""
        with self._lock:
            if id(attached) in self._attached:
                self._attached.remove(id(attached))
                if not self._attached:
                    self._in_place.close()

    def _restore_call(self) -> None:
        """Let calls of modules pass as before, unless somebody else has replaced them meanwhile."""
        if module_call() is _intercepted_call:
            replace_module_call(self.original)

    def enter_call_of_compiled(self) -> None:
        """Let calls of modules that are compiled in place pass through the table too.

        Their method `compile` has kept their call as it was before.
        """
        with self._lock:
            if self._attached and not self._takes_outer_calls:
                self._takes_outer_calls, call = True, outer_module_call()
                if call is not _call_of_compiled:
                    self.outer = call
                    functools.update_wrapper(_call_of_compiled, call)
                nn.Module.__call__ = _call_of_compiled  # type: ignore[method-assign]
                self._in_place.callback(self._restore_call_of_compiled)
                self._in_place.callback(take_for_plain("__call__", _call_of_compiled))
                self._in_place.callback(take_for_call_in_traces(_call_of_compiled))

    def _restore_call_of_compiled(self) -> None:
        """Let modules that are compiled in place run as before."""
        self._takes_outer_calls = False
        if nn.Module.__call__ is _call_of_compiled:
            nn.Module.__call__ = self.outer  # type: ignore[method-assign]

    def find(self, module: nn.Module) -> _Entry | None:
        """Return the entry of a module. A module that torch.compile has made of another one has the entry of that one."""
        entry = self.entries.get(module_identity(module))
        if entry is None:
            inside = uncompiled(module)
            return None if inside is module else self.find(inside)
        return entry if entry.module is module or is_replica(module) else None


_TABLE = _Table()


def _intercepted_call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Run the handler of a module if it is intercepted; otherwise run the module. This replaces a method of nn.Module.

    Code that is traced for torch.compile or torch.export is not intercepted.
    """
    if not is_dynamo_compiling():
        compiler = current_compiler()
        if compiler is not None:
            return _call_between_graphs(compiler, _TABLE.original, module, args, kwargs)
        entry = _TABLE.entries.get(module_identity(module))
        if entry is None:
            entry = _TABLE.find(module) if type(module) is _TABLE.wrapper else None
        elif not (entry[1] is module or is_replica(module)):
            entry = None
        if entry is not None and not is_compiled_here() and (interception := entry[0]()) is not None:
            return interception.handlers[entry[3]](entry[2], module, _TABLE.original, args, kwargs)
    return _TABLE.original(module, *args, **kwargs)


def _call_of_compiled(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Call a module. The handler of one that was compiled in place, and is intercepted, runs around its compiled code.

    This replaces `nn.Module.__call__` while such a module is intercepted. Inside of the compiled code nobody calls the module.
    """
    if not is_dynamo_compiling():
        compiler = current_compiler()
        if compiler is not None:
            return _call_between_graphs(compiler, _TABLE.outer, module, args, kwargs)
        entry = _TABLE.find(module) if compiled_call(module) is not None else None
        if entry is not None and not is_compiled_here() and (interception := entry.interception()) is not None:
            return interception.handlers[entry.kind](entry.name, module, _TABLE.outer, args, kwargs)
    return _TABLE.outer(module, *args, **kwargs)


def _call_between_graphs(
    compiler: Compiler, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module in code that is being compiled, or runs between compiled graphs. Its handler is not compiled."""
    set_compiler(None)
    try:
        run, entry = functools.partial(_resume, compiler, original), _TABLE.find(module)
        interception = None if entry is None or is_compiled_here() else entry.interception()
        if entry is None or interception is None:
            return run(module, *args, **kwargs)
        return interception.handlers[entry.kind](entry.name, module, run, args, kwargs)
    finally:
        set_compiler(compiler)


def _resume(compiler: Compiler, original: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Run a module whose handler was called between graphs, and let its code be compiled again."""
    # The compiler is False where only code that does not count would run.
    before = set_compiler(choose_compiler(compiler, None) if compiler else None)
    try:
        return original(module, *args, **kwargs)
    finally:
        set_compiler(before)


#: What runs between the caller of a module and its handler, or between the handler and the module. None of it is compiled.
_OURS = (_intercepted_call, _call_of_compiled, _call_between_graphs, _resume)

#: The code that PyTorch and the interception run between the caller of a module and `_intercepted_call`.
#: By identity, because the hash of a code object takes long.
_BETWEEN = {id(function.__code__): function.__code__ for function in (cast(FunctionType, nn.Module.__call__), *_OURS)}


def identities_of_others(modules: Collection[nn.Module]) -> set[int]:
    """Return the identities of all modules that are intercepted, except those of `modules`."""
    own = {id(module) for module in modules}
    return {id(entry.module) for entry in list(_TABLE.entries.values())} - own


def calling_frame() -> FrameType:
    """Return the stack frame that calls the module whose handler asks."""
    frame = stack_frame(3)  # 1 is the handler, 2 is `_intercepted_call`
    while id(frame.f_code) in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return frame


@functools.cache
def _registration_handle() -> RemovableHandle:
    """Register the hook that is told of modules, and return its handle."""
    return register_module_module_registration_hook(_tell_of_module)


def _hook_registrations() -> RemovableHandle:
    """Let the hook be told of modules. Its key is always the same, because compiled code that makes modules depends on it."""
    handle = _registration_handle()
    hooks = handle.hooks_dict_ref()
    if hooks is not None:
        hooks[handle.id] = _tell_of_module
    return handle


def _tell_of_module(owner: nn.Module, attribute: str, module: nn.Module | None) -> None:
    """Tell the interception of a module that another module is about to be put into it. PyTorch calls this hook."""
    entry = _TABLE.entries.get(module_identity(owner)) if "_forward_hooks" in vars(owner) else None
    if entry is None or entry.module is not owner:  # the latter is a replica, which nn.DataParallel puts together
        return
    interception = entry.interception()
    if interception is not None and isinstance(module, nn.Module):
        interception.added(entry.name, attribute, module)
