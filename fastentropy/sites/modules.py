"""Know the modules of a model by path: which are activations, which may call activations, and which take a padding mask."""

import functools
import re
import weakref
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastentropy._compat import is_replica, module_identity, path_when_uncompiled
from fastentropy._utils.frames import local_variable
from fastentropy.sites.activations import activation_name, function_name
from fastentropy.sites.padding import Mask, MaskArgument, mask_argument

#: The kinds of modules, which are the kinds of `Interception`. A layer is a module of torch.nn that computes something, and a
#: neutral module one that passes its input on. A container is any other module, because its forward may call activations.
ACTIVATION, CONTAINER, LAYER, NEUTRAL = "activation", "container", "layer", "neutral"

_NEUTRAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

#: The channel axis of what a layer returns, for layers that have the same one for all inputs, counted from the end.
_OUTPUT_AXES: dict[tuple[type[nn.Module], ...], int] = {
    (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm): -1,
    (nn.Conv1d, nn.ConvTranspose1d): -2,
    (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d): -3,
    (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d): -4,
}


class WatchedModules:
    """Hold the modules of a model by path.

    Attributes:
        kinds: for each path, the module and its kind.
        activations: the name of the activation of each activation module, by path.
        mask_arguments: the argument that holds the padding mask, by path of the container that takes one.
        class_name: the name of the model's class, with its module.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        """Take the modules that a model has now.

        Args:
            model: any module.
            mask: where the padding mask of a call comes from.
        """
        self.kinds: dict[str, tuple[nn.Module, str]] = {}
        self.activations: dict[str, str] = {}
        self.mask_arguments: dict[str, MaskArgument] = {}
        self._model, self._mask = model, mask
        self._paths: dict[int, str] = {}
        self._methods: set[CodeType] = set()
        self._activation_methods: set[CodeType] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take the modules that the model has now, and forget all others."""
        for known in (self.kinds, self.activations, self.mask_arguments, self._paths, self._methods, self._activation_methods):
            known.clear()
        self.add("", self._model)
        kind = self.class_at("")
        self.class_name = f"{kind.__module__}.{kind.__qualname__}"

    def add(self, path: str, module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """Take a module that the model has, or is about to have, under a path, with all its submodules.

        Returns:
            For each path, the module and its kind.
        """
        new = {}
        for name, submodule in module.named_modules(prefix=path):
            name = path_when_uncompiled(name)
            new[name] = self.kinds[name] = submodule, self._kind(submodule)
            self._paths[module_identity(submodule)] = name
            kind: Any = type(submodule)
            self._methods |= _methods(kind)
            for value in vars(submodule).values():
                if isinstance(value, _WITH_CODE):
                    self._methods |= _codes(value)
            if activation := activation_name(submodule):
                self.activations[name] = activation
                self._activation_methods |= _methods(kind)
            is_container = new[name][1] == CONTAINER and isinstance(self._mask, str)
            if is_container and (argument := mask_argument(submodule, str(self._mask))):
                self.mask_arguments[name] = argument
        return new

    def remove(self, path: str) -> list[nn.Module]:
        """Forget the module at a path, with all below it, and return them."""
        inside = f"{path}."
        gone = [name for name in self.kinds if not path or name == path or name.startswith(inside)]
        for name in gone:
            self.activations.pop(name, None)
            self.mask_arguments.pop(name, None)
            self._paths.pop(module_identity(self.kinds[name][0]), None)
        return [self.kinds.pop(name)[0] for name in gone]

    def path_of(self, value: object) -> str | None:
        """Return the path of a value if it is a module of the model, or a replica of one; otherwise None."""
        if not isinstance(value, nn.Module) or "_forward_hooks" not in vars(value):  # its __init__ is not done
            return None
        path = self._paths.get(module_identity(value))
        return path if path is not None and (self.kinds[path][0] is value or is_replica(value)) else None

    def path_in(self, frame: FrameType) -> str | None:
        """Return the path of the module of which a stack frame runs a method; None if it runs other code."""
        code = frame.f_code
        return self.path_of(local_variable(frame, code.co_varnames[0])) if code in self._methods else None

    def activation_in(self, frame: FrameType) -> str | None:
        """Return the path of the activation module of which a stack frame runs a method; None if it runs other code."""
        return self.path_in(frame) if frame.f_code in self._activation_methods else None

    def path_at(self, path: str) -> str:
        """Return the path of the module that the attributes of a path lead to. A module may have several; one is its path."""
        if path in self.kinds or not path:
            return path
        try:
            return self.path_of(self._model.get_submodule(path)) or path
        except AttributeError:
            return path

    def function_path(self, owner: str, function: str) -> str:
        """Return the path for the calls of a function by the module with the path `owner`.

        If a module of the model has this path, a number is added to it.
        """
        path = f"{owner}.{function}".lstrip(".")
        index = 0
        while path in self.kinds:
            index += 1
            path = f"{owner}.{function}_{index}".lstrip(".")
        return path

    def class_at(self, path: str) -> type[nn.Module]:
        """Return the class of the module at a path; nn.Module if there is none."""
        return type(self.kinds[path][0]) if path in self.kinds else nn.Module

    def _kind(self, module: nn.Module) -> str:
        """Return the kind of a module."""
        if activation_name(module):
            return ACTIVATION
        if isinstance(module, _NEUTRAL):
            return NEUTRAL
        childless = next(module.children(), None) is None
        is_layer = childless and type(module).__module__.startswith("torch.nn.modules.")
        return LAYER if (is_layer or isinstance(module, torch.jit.ScriptModule)) and module is not self._model else CONTAINER


#: The classes of what `_codes` looks into. A tuple, since `isinstance` takes several times as long with a union of types.
_WITH_CODE = (FunctionType, MethodType, property, classmethod, functools.cached_property)
#: What `_methods` returns, by class. A class is held weakly, because code that was compiled lives as long as the class.
_METHODS: "weakref.WeakKeyDictionary[type, frozenset[CodeType]]" = weakref.WeakKeyDictionary()


def _methods(kind: Any) -> frozenset[CodeType]:
    """Return the code of the methods and properties that a class of modules has besides those of nn.Module."""
    known = _METHODS.get(kind)
    if known is None:
        classes = [owner for owner in kind.__mro__ if issubclass(owner, nn.Module) and owner is not nn.Module]
        codes = (_codes(value) for owner in classes for value in vars(owner).values())
        known = _METHODS[kind] = frozenset[CodeType]().union(*codes)
    return known


def _codes(method: Any) -> set[CodeType]:
    """Return the code of a method, also of one that is decorated or a property; empty for anything else."""
    if not isinstance(method, _WITH_CODE):
        return set()
    inner = [getattr(method, name, None) for name in ("fget", "func", "__func__", "__wrapped__")]
    codes = set[CodeType]().union(*(_codes(each) for each in inner if callable(each)))
    if isinstance(method, FunctionType) and method.__code__.co_argcount:
        codes.add(method.__code__)
    return codes


def output_axis(module: nn.Module, y: Tensor) -> int | None:
    """Return the channel axis of what a layer of torch.nn has returned; None if the class of the layer does not tell."""
    axis = next((axis for kinds, axis in _OUTPUT_AXES.items() if isinstance(module, kinds)), None)
    return None if axis is None or y.ndim < -axis else axis % y.ndim


def is_scripted_activation(module: nn.Module) -> bool:
    """Return whether a module was compiled by TorchScript and runs an activation."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    operators = re.findall(r"aten::(\w+)", str(getattr(module, "inlined_graph", "")))
    functions = [getattr(namespace, name, None) for name in operators for namespace in (torch.Tensor, F)]
    return any(function is not None and function_name(function) for function in functions)
