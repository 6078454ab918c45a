"""Give every activation call of a model a module of its own, so that each can be counted and removed by itself."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import itertools
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastentropy._compat import children_of, is_compiled, tree_leaves
from fastentropy._utils.errors import one_line
from fastentropy.sites import finding, interception, watcher
from fastentropy.sites.activations import activation_name, function_name
from fastentropy.sites.finding import call_once
from fastentropy.sites.interception import fast_paths
from fastentropy.sites.site import Call
from fastentropy.sites.watcher import NoObserver, SiteWatcher
from fastentropy.surgery.rewriting import Arguments, CannotBeRewrittenError, MethodRewriter, Place

#: Activation -> the module for the function, and the names of the function's arguments after the input, in order.
_MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ("inplace",)),
    "relu6": (nn.ReLU6, ("inplace",)),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope", "inplace")),
    "elu": (nn.ELU, ("alpha", "inplace")),
    "selu": (nn.SELU, ("inplace",)),
    "celu": (nn.CELU, ("alpha", "inplace")),
    "gelu": (nn.GELU, ("approximate",)),
    "silu": (nn.SiLU, ("inplace",)),
    "mish": (nn.Mish, ("inplace",)),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "hardswish": (nn.Hardswish, ("inplace",)),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val", "inplace")),
}

#: Files whose frames come between the code that calls an activation and the observer of the call.
_BETWEEN = (
    __file__,
    *(str(module.__file__) for module in (finding, interception, watcher)),
    *(
        str(Path(torch.__file__).parent / name)
        for name in ("nn/functional.py", "nn/modules/module.py", "nn/modules/activation.py", "overrides.py", "_tensor.py")
    ),
)


def isolate(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> nn.Module:
    """Return a model of the same function in which each call of an activation has a module of its own.

    The given model is not changed. The new one has modules of its own and shares parameters and buffers: training one trains
    both, an optimizer stays valid, and the state dict has the same keys. A module whose methods call an activation function, or
    one activation module several times, gets a subclass of its class with these methods rewritten: F.relu(x) becomes
    self.relu(x), and further calls become self.relu_1(x), …

    Warns, and names the calls, where some cannot be isolated:

    - in a loop, or in a module that is itself called several times;
    - outside the methods of a module, or in code without a source file (typed into a prompt);
    - with arguments that are not constants;
    - of a function that has no module in torch.nn, such as one that was registered.

    Args:
        model: any module.
        example_inputs: the positional inputs of one call, or a mapping of its keyword inputs. Calls are isolated that the model
            makes for these in eval mode.

    Returns:
        The new model.

    Raises:
        RuntimeError: the model is compiled, or the new model computes something else on the example.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), relu := torch.nn.ReLU(), torch.nn.Linear(3, 3), relu)
        >>> x = (torch.zeros(1, 3),)
        >>> [site.name for site in fe.find_sites(model, x)]
        ['1', '1:1']
        >>> [site.name for site in fe.find_sites(fe.isolate(model, x), x)]
        ['1', '3']
    """
    if compiled := [name for name, module in model.named_modules() if is_compiled(module)]:
        raise RuntimeError(
            f"{compiled[0] or type(model).__name__!r} is compiled; isolate the model as it was before torch.compile"
        )
    isolated = copy_sharing_tensors(model)
    _separate_places(isolated)
    calls = _trace(isolated, example_inputs).calls
    for caller in {id(call.caller): call.caller for call in calls if call.caller is not None}.values():
        _isolate_calls(caller, [call for call in calls if call.caller is caller])
    for module, name, value in fast_paths(isolated):
        setattr(module, name, value)
    _compare(model, isolated, example_inputs)
    if left := _not_isolated(isolated, example_inputs):
        warnings.warn(
            f"{len(left)} activation calls of {type(model).__name__} have no module of their own: {', '.join(left)} "
            "(in a loop, in a module that is called several times, with arguments that are not constants, or in code without "
            "a source file); write them as modules by hand",
            stacklevel=2,
        )
    return isolated


class _Traced(NamedTuple):
    """One activation call of the example, with the code that makes it."""

    name: str  # of the site
    activation: str
    module: nn.Module | None
    function: str  # without underscores; empty for a module
    inplace: bool
    code: CodeType
    place: Place | None  # None where the call cannot be identified in its code
    caller: nn.Module | None  # the code is a method of this module


class _Tracer(NoObserver):
    """Records who calls each activation."""

    def __init__(self) -> None:
        self.calls: list[_Traced] = []

    def run_activation(self, forward_pass: None, call: Call) -> Any:
        frame = _calling_frame()
        code = frame.f_code
        caller = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        self.calls.append(
            _Traced(
                call.site.name,
                call.site.activation,
                call.module,
                call.function.strip("_"),
                call.function.endswith("_"),
                code,
                Place.of(frame),
                caller if isinstance(caller, nn.Module) else None,
            )
        )
        return super().run_activation(forward_pass, call)


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """Return a copy with modules of its own and the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _separate_places(model: nn.Module) -> None:
    """Give each place of an activation module a copy of its own where the model holds it in several; share parameters."""
    seen: set[int] = set()
    for module in list(model.modules()):
        for name, child in children_of(module).items():
            if child is not None and activation_name(child):
                if id(child) in seen:
                    children_of(module)[name] = copy_sharing_tensors(child)
                seen.add(id(child))


def _trace(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> _Tracer:
    tracer = _Tracer()
    watcher = SiteWatcher(model, tracer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the recommendation to isolate
        watcher.attach()
        try:
            call_once(model, example_inputs)
        finally:
            watcher.detach()
    return tracer


def _calling_frame() -> FrameType:
    """Return the innermost frame that is neither of this package nor of the functions that PyTorch puts around a call."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    assert frame is not None
    return frame


def _isolate_calls(caller: nn.Module, calls: Sequence[_Traced]) -> None:
    """Give modules of their own to the calls that the methods of one module make, as far as possible."""
    if isinstance(caller, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return  # a new module would be one more in the sequence
    times = Counter((call.code, call.place) for call in calls)
    needy = [call for call in calls if times[call.code, call.place] == 1 and (call.module is None or ":" in call.name)]
    methods: dict[str, Any] = {}
    for code in {call.code: None for call in needy}:
        with contextlib.suppress(CannotBeRewrittenError):
            methods |= _isolate_in_method(caller, code, [call for call in needy if call.code is code])
    if methods:
        kind = type(caller)
        body = {**methods, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        caller.__class__ = types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))


def _isolate_in_method(caller: nn.Module, code: CodeType, calls: Sequence[_Traced]) -> dict[str, Any]:
    """Return the method with this code, by its names, with calls of new modules, which become attributes of the caller."""
    rewriter = MethodRewriter(caller, code)
    added: dict[str, nn.Module] = {}
    for call in calls:
        with contextlib.suppress(CannotBeRewrittenError):
            node = rewriter.find(call.place)
            arguments = rewriter.arguments(node)
            _check_is_called(call, rewriter.value(node.func), node)
            module = _module_for(call, arguments)
            attribute = rewriter.own_function(node)
            if attribute is None or attribute in added:
                attribute = _unused_attribute(caller, added, call.function or call.name.rpartition(".")[2].partition(":")[0])
                rewriter.replace(node, attribute, arguments.input)
            added[attribute] = module.train(caller.training)
    methods = dict.fromkeys(rewriter.names, rewriter.compile()) if rewriter.changed else {}
    for attribute, module in added.items():
        setattr(caller, attribute, module)
    return methods


def _check_is_called(call: _Traced, value: Any, node: ast.Call) -> None:
    """Raise where the code may call something else than the example did: another module, function or tensor method."""
    if value is None and call.module is None and isinstance(node.func, ast.Attribute):
        value = getattr(Tensor, node.func.attr, None)
        if node.args:
            raise CannotBeRewrittenError  # of some other object: the input would not be the receiver
    if call.module is not None and value is not call.module:
        raise CannotBeRewrittenError
    if call.module is None and (not callable(value) or function_name(value) != call.activation):
        raise CannotBeRewrittenError


def _module_for(call: _Traced, arguments: Arguments) -> nn.Module:
    if call.module is None:
        return _as_module(call, arguments.constants())
    if any(True for _ in (*call.module.parameters(), *call.module.buffers())):
        raise CannotBeRewrittenError  # a copy would bring new keys into the state dict
    return copy.deepcopy(call.module)


def _as_module(call: _Traced, constants: tuple[Sequence[Any], Mapping[str, Any]]) -> nn.Module:
    """Return the module that computes the same as a call of a function, from its constant arguments after the input."""
    if call.activation not in _MODULES:
        raise CannotBeRewrittenError
    kind, names = _MODULES[call.activation]
    positional, options = constants
    if len(positional) > len(names) or not set(options) <= set(names):
        raise CannotBeRewrittenError
    options = {**dict(zip(names, positional, strict=False)), **options}
    return kind(**options, **({"inplace": True} if call.inplace else {}))


def _unused_attribute(module: nn.Module, added: Mapping[str, nn.Module], name: str) -> str:
    taken = {*dir(module), *added}
    candidates = itertools.chain([name], (f"{name}_{index}" for index in itertools.count(1)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _compare(model: nn.Module, isolated: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> None:
    """Raise where the two models differ on the example."""
    expected, actual = (tree_leaves(call_once(each, example_inputs)) for each in (model, isolated))
    if len(expected) != len(actual):
        raise _different(model, f"{len(expected)} of them, then {len(actual)}")
    for left, right in zip(expected, actual, strict=True):
        if isinstance(left, Tensor):
            try:
                torch.testing.assert_close(right, left, equal_nan=True)
            except AssertionError as error:
                raise _different(model, one_line(error)) from error


def _different(model: nn.Module, how: str) -> RuntimeError:
    return RuntimeError(
        f"{type(model).__name__} cannot be isolated: its outputs would differ ({how}); does it return the same each time?"
    )


def _not_isolated(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> list[str]:
    return [call.name for call in _trace(model, example_inputs).calls if call.module is None or ":" in call.name]
