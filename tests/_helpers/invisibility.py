"""What a program can find out about a model and about PyTorch, to show that it cannot tell whether a collector is attached."""

import copy
import functools
import inspect
import io
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastentropy as fe

#: What `appearance` returns: a value for each thing that was looked at, by its name.
Appearance = dict[str, Any]
C = TypeVar("C", bound=AbstractContextManager[Any])

#: What may differ while a collector is attached, and no longer: how a call of nn.Module becomes a forward, and hooks that are
#: told of modules which are put into others. See `mechanism`.
_CALLS, _REGISTRATION = ("__call__", "_call_impl"), "_global_module_registration_hooks"


class Same(tuple[int, Any]):
    """An object that equals itself alone. It is kept alive, so that no other object gets its place in memory."""

    def __new__(cls, value: Any) -> "Same":
        return super().__new__(cls, (id(value), value))  # of which the second is compared only if the first are equal

    def __repr__(self) -> str:
        return f"{type(self[1]).__name__} at {self[0]:#x}"


class Content(tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...]]):
    """The keys of a dictionary and its values, each of which equals itself alone, as with `Same`."""

    def __new__(cls, value: Mapping[Any, Any]) -> "Content":
        values = tuple(value.values())
        return super().__new__(cls, (tuple(value), tuple(map(id, values)), values))

    def named(self, prefix: str) -> dict[str, Any]:
        """Return the values by name, and the names in order."""
        return {f"{prefix} {key}": Same(value) for key, value in zip(self[0], self[2], strict=True)} | {prefix: self[0]}


@dataclass(frozen=True)
class Observation:
    """How a model and PyTorch look before, during and after some passes, and what the passes return.

    Attributes:
        stages: an appearance for each stage: "before", "after", and "in NAME" inside of the forward of the module NAME.
        outputs: what the passes return.
    """

    stages: dict[str, Appearance]
    outputs: Any


def assert_invisible(
    model: nn.Module,
    run: Callable[[], Any],
    collector: C | None = None,
    inside: Iterable[str] | None = None,
    in_copies: bool = True,
) -> C | fe.EntropyCollector:
    """Assert that a program cannot tell whether a collector is attached to a model.

    The passes run without a collector, twice while it is attached, and again without it. Nothing may differ but what already
    differs between two runs without a collector.

    Args:
        model: the model.
        run: a function that runs passes of the model and returns tensors: outputs or gradients.
        collector: a context manager that collects. By default `fe.collect(model)`.
        inside: the names of the modules in whose forwards to look. By default two layers and a module
            with submodules.
        in_copies: look at pickles and deep copies of the model too, if it can be copied.

    Returns:
        The collector, which is detached.
    """
    import_all()
    collector = fe.collect(model) if collector is None else collector
    appearance(model, in_copies)  # the first copy of an object adds `__slotnames__` to its class
    untouched = mechanism()
    with _looking_inside(model, places_to_look(model) if inside is None else inside) as seen:
        plain, again = (observe(model, run, seen, in_copies) for _ in range(2))
        assert differences(plain.outputs, again.outputs) == [], "two runs without a collector differ"
        changing = _changing(plain, again)
        with collector:
            observations = {f"pass {number}": observe(model, run, seen, in_copies) for number in (1, 2)}
        assert changes(untouched, mechanism()) == {}, "left behind"
        observations["detached"] = observe(model, run, seen, in_copies)
    for when, observation in observations.items():
        assert differences(again.outputs, observation.outputs) == [], f"outputs of {when}"
        assert observation.stages.keys() == again.stages.keys(), f"places seen in {when}"
        for stage, expected in again.stages.items():
            # In the first pass through a model, a mode follows the operators. It is on the stack in forwards, and only there.
            in_mode = {("dispatch modes", "")} if when == "pass 1" and stage.startswith("in ") else set()
            assert changes(expected, observation.stages[stage], changing | in_mode) == {}, f"{when}, {stage}"
    return collector


def observe(model: nn.Module, run: Callable[[], Any], seen: dict[str, Appearance], in_copies: bool) -> Observation:
    """Run passes with the random numbers of one seed, and look at the model before, during and after them.

    Args:
        model: the model.
        run: the passes.
        seen: where hooks put what they see during a pass.
        in_copies: look at copies of the model too.
    """
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    seen.clear()
    stages = {"before": appearance(model, in_copies)}
    outputs = run()
    stages |= {f"in {name}": look for name, look in seen.items()}
    return Observation(stages | {"after": appearance(model)}, outputs)


def mechanism() -> Appearance:
    """Return what a collector may change in PyTorch while it is attached, and must leave as it was when it is detached."""
    return {
        "calls": [Same(vars(nn.Module)[name]) for name in _CALLS],
        "hooks of registration": Content(vars(nn.modules.module)[_REGISTRATION]),
        "dispatch keys": str(torch._C._dispatch_tls_local_include_set()),
        "stance": torch._dynamo.eval_frame._stance.stance if "torch._dynamo" in sys.modules else "default",
    }


def places_to_look(model: nn.Module) -> list[str]:
    """Return the names of two layers with weights, and of a module with submodules."""
    modules = {name: module for name, module in model.named_modules() if name}
    layers = [name for name, module in modules.items() if module._parameters and not isinstance(module, nn.PReLU)]
    inner = [name for name, module in modules.items() if next(module.children(), None) is not None]
    return sorted({*layers[-1:], *layers[len(layers) // 2 :][:1], *inner[len(inner) // 2 :][:1]})


@functools.cache
def import_all() -> None:
    """Let a collector import what it needs, for some libraries add filters of warnings."""
    model = nn.Sequential(nn.ReLU())
    with fe.collect(model):
        model(torch.ones(2, 3))


def appearance(model: nn.Module, in_copies: bool = False) -> Appearance:
    """Return all that a program can find out about a model and about the state of PyTorch without running the model.

    Args:
        model: the model.
        in_copies: look at a pickle and at a deep copy of the model too, which take time.
    """
    look: Appearance = {"repr": repr(model), "state_dict": list(model.state_dict()), **state_of_pytorch()}
    kinds: dict[type, None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_first = type(module) not in kinds or "forward" in vars(module)
        look[f"module {name}"] = dict(_look_at(module, is_first))
        kinds |= dict.fromkeys(type(module).__mro__)
    for kind in kinds.keys() - {object, nn.Module}:
        look[f"class {kind.__module__}.{kind.__qualname__}"] = {
            "subclasses": [Same(child) for child in type.__subclasses__(kind)],
            "bases": [Same(base) for base in kind.__mro__],
            "attribute": Content(vars(kind)),
        }
    if in_copies:
        look |= {"pickle": _pickled(model), "deep copy": _copied(model)}
    return look


def state_of_pytorch() -> Appearance:
    """Return modes, switches, random numbers, global hooks and the functions of PyTorch."""
    look: Appearance = {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "random numbers of torch": torch.get_rng_state().numpy().tobytes(),
        "random numbers of Python": random.getstate(),
        "random numbers of NumPy": str(np.random.get_state(legacy=False)),
        "filters of warnings": list(warnings.filters),
    }
    for name, value in vars(nn.modules.module).items():
        if name.startswith("_global") and name != _REGISTRATION:
            look[f"global {name}"] = [Same(value), Content(value) if isinstance(value, dict) else None]
    for owner in (nn.functional, Tensor, torch._C._TensorBase, nn.Module):
        names = vars(owner).keys() - (set(_CALLS) if owner is nn.Module else set())
        look[f"attributes of {owner.__name__}"] = Content({name: vars(owner)[name] for name in sorted(names)})
    return look


def changes(
    expected: Appearance, actual: Appearance, apart_from: Iterable[tuple[str, str]] = ()
) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return both values of everything that differs between two appearances, by its name and the name inside of it."""
    pairs = {
        (name, key): (first.get(key, "missing"), second.get(key, "missing"))
        for name in [*expected, *(actual.keys() - expected.keys())]
        if expected.get(name) != actual.get(name)
        for first, second in [(_parts(expected.get(name)), _parts(actual.get(name)))]
        for key in first.keys() | second.keys()
    }
    skipped = set(apart_from)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in skipped}


def differences(expected: Any, actual: Any) -> list[str]:
    """Return where two nested results differ, in a bit, a stride or a class."""
    leaves, form = pytree.tree_flatten_with_path(expected)
    others, other_form = pytree.tree_flatten_with_path(actual)
    if form != other_form:
        return [f"{form} became {other_form}"]
    return [
        f"{pytree.keystr(path)}: {first} became {second}"
        for (path, first), (_, second) in zip(leaves, others, strict=True)
        if not (_same_tensor(first, second) if isinstance(first, Tensor) else _same_value(first, second))
    ]


def _same_value(first: Any, second: Any) -> bool:
    """Return whether two values are equal; of objects that equal themselves alone, whether their classes are."""
    is_comparable = type(first).__eq__ is not object.__eq__
    return bool(first == second) if is_comparable else type(first) is type(second)


def _same_tensor(first: Tensor, second: Any) -> bool:
    """Return whether two tensors have the same class, layout, need of gradients, and bits."""
    kinds = [(type(x), x.dtype, x.shape, x.stride(), x.requires_grad) for x in (first, second) if x.layout is torch.strided]
    bits = [x.detach().contiguous().flatten().view(torch.uint8) if x.ndim else x.detach().item() for x in (first, second)]
    return kinds[0] == kinds[1] and (torch.equal(*bits) if first.ndim else bits[0] == bits[1])


def _look_at(module: nn.Module, is_first: bool) -> Iterator[tuple[str, Any]]:
    """Give what can be found out about one module. `is_first` adds what follows from its class alone."""
    kind, attributes = type(module), vars(module)
    yield "type", Same(kind)
    yield "__class__", Same(module.__class__)
    yield "bound forward", Same(getattr(module.forward, "__func__", None))
    yield "attribute", Content(attributes)
    for key, value in attributes.items():
        if value and isinstance(value, dict):  # hooks, parameters, buffers, submodules
            yield f"attribute {key} with", Content(value)
    if is_first:
        yield "isinstance", all(isinstance(module, base) for base in kind.__mro__)
        yield "dir", dir(module)
        yield "signature of forward", _signature(module.forward)
        yield "signature of call", _signature(module)
        yield "call", next(owner for owner in kind.__mro__ if "__call__" in vars(owner))


def _signature(function: Callable[..., Any]) -> object:
    """Return the signature of a function, or the error where a builtin function has none."""
    try:
        return inspect.signature(function)
    except ValueError as error:
        return str(error)


class _Skeleton(pickle.Pickler):
    """Pickle everything but tensors, which are large and have nothing to do with collecting."""

    def persistent_id(self, value: Any) -> str | None:
        return f"tensor {id(value)}" if isinstance(value, Tensor) else None


def _pickled(model: nn.Module) -> object:
    """Return the pickle of a model without its tensors, or the error if it cannot be pickled."""
    file = io.BytesIO()
    try:
        _Skeleton(file).dump(model)
    except Exception as error:
        return type(error)
    return file.getvalue()


def _copied(model: nn.Module) -> object:
    """Return the classes and attributes in a deep copy of a model, which shares the tensors, or the error if there is none."""
    memo = {id(x): x for x in (*model.parameters(), *model.buffers())}
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        return type(error)
    return [(name, Same(type(module)), list(vars(module))) for name, module in duplicate.named_modules()]


class _Look:
    """A hook of the user, which looks at the model inside of the first call of a module."""

    def __init__(self, model: nn.Module | None = None, name: str = "", seen: dict[str, Appearance] | None = None) -> None:
        self._model, self._name, self._seen = model, name, seen

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._seen is not None and self._model is not None and self._name not in self._seen:
            self._seen[self._name] = appearance(self._model)

    def __deepcopy__(self, memo: object) -> "_Look":
        return _Look()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Look, ()


@contextmanager
def _looking_inside(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Appearance]]:
    """Look inside of the forwards of modules during the block. Yield the dictionary that gets what is seen, by name."""
    seen: dict[str, Appearance] = {}
    handles = [model.get_submodule(name).register_forward_pre_hook(_Look(model, name, seen), prepend=True) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _changing(plain: Observation, again: Observation) -> set[tuple[str, str]]:
    """Return what differs between two runs without a collector: attributes that the model itself sets."""
    changing = {name for stage, look in plain.stages.items() for name in changes(look, again.stages[stage])}
    unexpected = {name for name in changing if not name[1].startswith("attribute")} - {("pickle", ""), ("deep copy", "")}
    assert not unexpected, f"two runs without a collector differ: {unexpected}"
    return changing


def _parts(look: Any) -> dict[str, Any]:
    """Return an entry of an appearance as a dictionary, with an entry for each attribute."""
    parts = look if isinstance(look, dict) else {"": look}
    contents = {name: part for name, part in parts.items() if isinstance(part, Content)}
    return {name: part for name, part in parts.items() if name not in contents} | {
        key: value for name, part in contents.items() for key, value in part.named(name).items()
    }
