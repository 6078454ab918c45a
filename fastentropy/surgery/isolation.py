"""Give every activation call of a model a module of its own, so that each call can be counted and removed by itself."""

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
from fastentropy._utils.frames import local_variable
from fastentropy._utils.text import plural
from fastentropy.sites import channel_axis, finding, interception, operators, reporter, watcher
from fastentropy.sites.activations import activation_name, function_name
from fastentropy.sites.fast_paths import fast_paths
from fastentropy.sites.finding import call_once, call_watched
from fastentropy.sites.inputs import ExampleInputs, check_inputs, check_model
from fastentropy.sites.observer import NoObserver
from fastentropy.sites.site import Call
from fastentropy.sites.watcher import SiteWatcher
from fastentropy.surgery.rewriting import Arguments, CannotBeRewrittenError, MethodRewriter, Place
from fastentropy.surgery.site_names import keep_names

#: Name of an activation function -> the class of the module that computes the same, and the names of the function's arguments
#: after the input, in order.
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

#: Source files of the stack frames between the code that calls an activation and the observer that sees the call.
_BETWEEN = (
    __file__,
    *(str(module.__file__) for module in (channel_axis, finding, interception, operators, reporter, watcher)),
    *(str(Path(__file__).parent.parent / name) for name in ("_compat/interception.py", "sites/fast_paths.py")),
    *(
        str(Path(torch.__file__).parent / name)
        for name in (
            "nn/functional.py",
            "nn/modules/module.py",
            "nn/modules/activation.py",
            "overrides.py",
            "_tensor.py",
            "utils/_device.py",
        )
    ),
)


def isolate(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """Return a copy of a model in which each call of an activation has a module of its own.

    The copy computes the same as the given model, which is not changed. The two share parameters and buffers, but no modules:
    training one trains both, an optimizer stays valid, and the state dict has the same keys. The copy remembers how its sites
    were called before, so that `prune` and `linearize_neurons` take statistics of the given model. If the methods of a module
    call an activation function, or call one activation module several times, the module gets a subclass of its class with these
    methods rewritten: F.relu(x) becomes self.relu(x), and further calls become self.relu_1(x), …

    Some calls cannot be isolated. They stay as they are, and a warning names them:

    - calls in a loop, or in a module that is itself called several times;
    - calls outside the methods of a module, or in code without a source file (typed into a prompt);
    - calls with arguments that are not constants;
    - calls of a function that has no module in torch.nn, such as a registered function.

    Args:
        model: any module.
        example_inputs: a tuple of the positional inputs of one call, or a mapping of its keyword inputs. Only the calls that
            the model makes for these inputs in eval mode are isolated.

    Returns:
        The copy.

    Raises:
        TypeError: `model` is not a module, `example_inputs` are of another kind (such as a single tensor), or the model takes
            other inputs.
        RuntimeError: the model is compiled, or the copy computes something else on the example.

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
    check_model(model)
    inputs = check_inputs(example_inputs, "fe.isolate(model, {})")
    if compiled := [name for name, module in model.named_modules() if is_compiled(module)]:
        raise RuntimeError(
            f"{compiled[0] or type(model).__name__!r} is compiled; isolate the model as it was before torch.compile"
        )
    before = [call.name for call in _trace(model, inputs).calls]
    isolated = copy_sharing_tensors(model)
    _separate_places(isolated)
    calls = _trace(isolated, inputs).calls
    for caller in {id(call.caller): call.caller for call in calls if call.caller is not None}.values():
        _isolate_calls(caller, [call for call in calls if call.caller is caller])
    for module, name, value in fast_paths(isolated):
        setattr(module, name, value)
    _compare(model, isolated, inputs)
    calls = _trace(isolated, inputs).calls
    keep_names(isolated, model, before, [call.name for call in calls])
    if left := [call.name for call in calls if call.module is None or ":" in call.name]:
        warnings.warn(
            f"{plural(len(left), 'activation call')} of {type(model).__name__} could be given no module: {', '.join(left)} (in "
            "a loop, in a module that is called several times, with arguments that are not constants, or in code without a "
            "source file); fe.prune keeps them, unless you write them as modules by hand",
            stacklevel=2,
        )
    return isolated


class _Traced(NamedTuple):
    """One activation call in the pass on the example, with the code that makes it."""

    name: str  # name of the site
    activation: str  # name of the activation
    module: nn.Module | None  # the activation module; None if a function is called
    function: str  # name of the function, without underscores at its ends; empty if a module is called
    inplace: bool  # whether the function works in place, such as relu_
    code: CodeType  # the code object that makes the call
    place: Place | None  # position of the call in the source; None if it cannot be identified
    caller: nn.Module | None  # the module of which the code is a method; None if it is no method of a module


class _Tracer(NoObserver):
    """Record which code calls each activation."""

    def __init__(self) -> None:
        """Begin without calls."""
        self.calls: list[_Traced] = []

    def run_activation(self, forward_pass: None, call: Call) -> Any:
        """Record the code that calls an activation, then run the activation."""
        frame = _calling_frame()
        code = frame.f_code
        caller = local_variable(frame, code.co_varnames[0]) if code.co_argcount else None
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
    """Return a copy of a model with new modules, but with the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _separate_places(model: nn.Module) -> None:
    """Replace an activation module that the model holds in several places by copies in all but the first place.

    The copies share its parameters.
    """
    seen: set[int] = set()
    for module in list(model.modules()):
        for name, child in children_of(module).items():
            if child is not None and activation_name(child):
                if id(child) in seen:
                    children_of(module)[name] = copy_sharing_tensors(child)
                seen.add(id(child))


def _trace(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> _Tracer:
    """Run the model on the example, and return a tracer with all activation calls."""
    tracer = _Tracer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the recommendation to isolate
        call_watched(SiteWatcher(model, tracer), model, inputs)
    return tracer


def _calling_frame() -> FrameType:
    """Return the innermost stack frame whose code is neither the watcher's nor PyTorch's code around an activation call."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    assert frame is not None
    return frame


def _isolate_calls(caller: nn.Module, calls: Sequence[_Traced]) -> None:
    """Isolate the activation calls that the methods of one module make, as far as possible.

    Args:
        caller: the module. If a method is rewritten, the class of the module is replaced by a subclass.
        calls: all activation calls that its methods make in the pass on the example.
    """
    if isinstance(caller, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return  # an attribute of a container would become one more of its entries
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
    """Give each traced call in one method of `caller` a new module, which is stored as an attribute of `caller`.

    The method is rewritten so that it calls the new modules. A call that cannot be rewritten stays as it is. If the called
    function is an attribute of `caller` itself, the new module replaces this attribute, and the call need not be rewritten.

    Args:
        caller: the module whose method makes the calls.
        code: the code object of the method.
        calls: the calls in this method to isolate.

    Returns:
        The rewritten method, under every name that it has in the class. Empty if no call had to be rewritten.

    Raises:
        CannotBeRewrittenError: the method cannot be rewritten at all.
    """
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
    """Raise CannotBeRewrittenError if the code may call something else than it did in the pass on the example.

    Args:
        call: the call in that pass.
        value: the called object, as far as it is known before the method runs; otherwise None.
        node: the call in the syntax tree.
    """
    if value is None and call.module is None and isinstance(node.func, ast.Attribute):
        value = getattr(Tensor, node.func.attr, None)
        if node.args:
            raise CannotBeRewrittenError  # perhaps a function of an unknown object, whose input is the argument
    if call.module is not None and value is not call.module:
        raise CannotBeRewrittenError
    if call.module is None and (not callable(value) or function_name(value) != call.activation):
        raise CannotBeRewrittenError


def _module_for(call: _Traced, arguments: Arguments) -> nn.Module:
    """Return the new module for a call: a copy of the called module, or a module that computes the same as the function."""
    if call.module is None:
        return _as_module(call, arguments.constants())
    if any(True for _ in (*call.module.parameters(), *call.module.buffers())):
        raise CannotBeRewrittenError  # a copy would bring new keys into the state dict
    return copy.deepcopy(call.module)


def _as_module(call: _Traced, constants: tuple[Sequence[Any], Mapping[str, Any]]) -> nn.Module:
    """Return the module that computes the same as a call of an activation function.

    Args:
        call: the call.
        constants: its arguments after the input: the positional ones, and the keyword arguments by name.

    Raises:
        CannotBeRewrittenError: torch.nn has no module for the function, or not with these arguments.
    """
    if call.activation not in _MODULES:
        raise CannotBeRewrittenError
    kind, names = _MODULES[call.activation]
    positional, options = constants
    if len(positional) > len(names) or not set(options) <= set(names):
        raise CannotBeRewrittenError
    options = {**dict(zip(names, positional, strict=False)), **options}
    return kind(**(options | {"inplace": True} if call.inplace else options))


def _unused_attribute(module: nn.Module, added: Mapping[str, nn.Module], name: str) -> str:
    """Return the first of `name`, `name_1`, `name_2`, … that is neither an attribute of the module nor in `added`."""
    taken = {*dir(module), *added}
    candidates = itertools.chain([name], (f"{name}_{index}" for index in itertools.count(1)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _compare(model: nn.Module, isolated: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> None:
    """Raise RuntimeError if the outputs of the two models differ on the example."""
    expected, actual = (tree_leaves(call_once(each, inputs)) for each in (model, isolated))
    if len(expected) != len(actual):
        raise _different(model, f"{len(expected)} of them, then {len(actual)}")
    for left, right in zip(expected, actual, strict=True):
        if isinstance(left, Tensor):
            try:
                torch.testing.assert_close(right, left, equal_nan=True)
            except AssertionError as error:
                raise _different(model, one_line(error)) from error


def _different(model: nn.Module, how: str) -> RuntimeError:
    """Return the error for a model whose copy computes something else; `how` tells the difference."""
    return RuntimeError(
        f"{type(model).__name__} cannot be isolated: its outputs would differ ({how}); does it return the same each time?"
    )
