"""Sites: the calls of rectifiers in a forward pass, their names, and which axis of their input holds the neurons."""

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from fastentropy.activations import activation_modules, activation_name

#: The attribute by which a watched forward names the model that is watched.
_WATCHED = "_fastentropy_watched"


@dataclass(frozen=True)
class Site:
    """One call of one activation in a forward pass.

    name is the module's dotted path, with :1, :2, … for further calls of it in the same pass. channel_axis is the axis of the
    activation's input whose entries are the neurons.
    """

    name: str
    activation: str
    neurons: int
    channel_axis: int


@torch.no_grad()
def find_sites(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[Site]:
    """The sites of a model in call order, from one forward pass in eval mode on example_inputs. The model is left as it was.

    Raises ValueError where the model has no known activation module.
    """
    watcher = SiteWatcher(model, observe=lambda site, x: None)
    training = [module for module in model.modules() if module.training]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    watcher.attach()
    try:
        model.eval()
        model(*copy.deepcopy(example_inputs))  # a model may write over its inputs
    finally:
        watcher.detach()
        for module in training:
            module.training = True
        for buffer, before in buffers:
            buffer.copy_(before)
    return list(watcher.sites.values())


class SiteWatcher:
    """Calls observe(site, x) with the input x of every activation call while attached, before the activation runs.

    The sites are discovered in the first complete forward pass. channel_axis names the neuron axis of sites where it should
    not be inferred from the operator that made their input. A copy of the model that is made in the meantime is not watched.
    """

    def __init__(
        self,
        model: nn.Module,
        observe: Callable[[Site, Tensor], None],
        begin_pass: Callable[[], None] = lambda: None,
        end_pass: Callable[[], None] = lambda: None,
        channel_axis: Mapping[str, int] | None = None,
    ) -> None:
        """Prepare to watch a model; begin_pass is called before each forward pass and end_pass after each complete one."""
        self.sites: dict[str, Site] = {}
        self._model, self._modules = model, activation_modules(model)
        self._observe, self._begin_pass, self._end_pass = observe, begin_pass, end_pass
        self._channel_axis = dict(channel_axis or {})
        self._handles: list[RemovableHandle] = []
        self._own_forward: Callable[..., Any] | None = None
        self._depth, self._calls = 0, Counter[str]()
        self._tracker: AxisTracker | None = None
        self._discovered = False

    def attach(self) -> None:
        """Begin to watch.

        Raises RuntimeError where the model is being watched already, or where a part is compiled and would ignore hooks.
        """
        if getattr(self._model.forward, _WATCHED, None) is self._model:
            raise RuntimeError("a collector is attached to this model already; detach it first")
        if compiled := [name for name, module in self._model.named_modules() if _is_compiled(module)]:
            raise RuntimeError(
                f"{type(self._model).__name__} is compiled ({', '.join(name or 'as a whole' for name in compiled)}) "
                "and would run past the collector; collect on the model as it was before torch.compile"
            )
        try:
            for name, module in self._modules.items():
                self._handles.append(module.register_forward_pre_hook(self._activation_hook(name), with_kwargs=True))
            self._model.forward = self._watched_forward()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self._model.forward, _WATCHED, None) is self._model:
            del self._model.forward
            if self._own_forward is not None:
                self._model.forward = self._own_forward

    def _watched_forward(self) -> MethodType:
        """The forward with a beginning and an end. As a method it is bound anew in a copy of the model, which runs alone."""
        original = self._model.forward
        self._own_forward = vars(self._model).get("forward")

        @functools.wraps(original)
        def watched_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not self._model:
                return type(module).forward(module, *args, **kwargs)
            with self._forward_pass():
                return original(*args, **kwargs)

        setattr(watched_forward, _WATCHED, self._model)
        return MethodType(watched_forward, self._model)

    @contextlib.contextmanager
    def _forward_pass(self) -> Iterator[None]:
        """One call of the model; a call of the model from inside of it belongs to the same pass."""
        outermost = self._depth == 0
        if outermost:
            self._calls.clear()
            self._tracker = None if self._discovered else AxisTracker()
            self._begin_pass()
        self._depth += 1
        try:
            with self._tracker if outermost and self._tracker else contextlib.nullcontext():
                yield
        finally:
            self._depth -= 1
        if outermost:
            self._discovered, self._tracker = True, None
            self._end_pass()

    def _activation_hook(self, name: str) -> Callable[..., None]:
        """A hook, as a function: a copy of the model keeps it as it is, and it does nothing for the copy's modules."""

        def before_activation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self._modules[name]:
                self._before_activation(name, module, args, kwargs)

        return before_activation

    def _before_activation(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._depth:
            raise RuntimeError(
                f"activation {name!r} ran outside of a call of the watched model; watch the module that you call"
            )
        x: Tensor = args[0] if args else kwargs["input"]
        call = self._calls[name]
        self._calls[name] += 1
        site_name = f"{name}:{call}" if call else name
        if site_name not in self.sites:
            self.sites[site_name] = self._discover(site_name, module, x)
        site = self.sites[site_name]
        if x.ndim <= site.channel_axis or x.shape[site.channel_axis] != site.neurons:
            raise RuntimeError(
                f"site {site_name!r} had {site.neurons} neurons on axis {site.channel_axis} and now has an input of shape "
                f"{list(x.shape)}; name its neuron axis with channel_axis={{{site_name!r}: …}}"
            )
        self._observe(site, x.detach())

    def _discover(self, name: str, module: nn.Module, x: Tensor) -> Site:
        axis = self._channel_axis.get(name)
        if axis is None and self._tracker is None:
            raise RuntimeError(
                f"site {name!r} did not run in the first forward pass; name its neuron axis with channel_axis={{{name!r}: 1}}"
            )
        if axis is None:
            assert self._tracker is not None
            axis = self._tracker.axis_of(x)
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"channel_axis of site {name!r} is {axis}, but its input has shape {list(x.shape)}")
        return Site(name, activation_name(module) or "", x.shape[axis], axis % x.ndim)


class AxisTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows, while active, which axis of every tensor holds the channels of the operator that produced it.

    A convolution or a channel norm makes axis 1, a matrix product or a layer norm the last axis; permutations and reshapes move
    it, and other operators keep it where they keep the number of axes.
    """

    # ATen operators by name: some exist only in some releases of PyTorch.
    _FIRST = frozenset({
        "convolution", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm", "native_group_norm",
    })  # fmt: skip
    _LAST = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "native_layer_norm"})
    _RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"})

    def __init__(self) -> None:
        """Know nothing yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes: dict[tuple[Any, ...], int] = {}

    def axis_of(self, x: Tensor) -> int:
        """The channel axis of x; where its origin is unknown, axis 1 of images (4 axes and more), else the last."""
        return self._axes.get(_place(x), 1 if x.ndim >= 4 else x.ndim - 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and note the channel axis of its outputs."""
        with self:
            # In inference mode operators arrive that elsewhere are broken down to those below before they come here.
            outputs = func.decompose(*args, **(kwargs or {}))
        if outputs is not NotImplemented:
            return outputs
        inputs = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = [(x, self._axes[_place(x)]) for x in inputs if _place(x) in self._axes]
        outputs = func(*args, **(kwargs or {}))
        for y in pytree.tree_leaves(outputs):
            if isinstance(y, Tensor):
                axis = self._output_axis(func, args, y, known)
                if axis is None:
                    self._axes.pop(_place(y), None)
                else:
                    self._axes[_place(y)] = axis
        return outputs

    def _output_axis(self, func: Any, args: Sequence[Any], y: Tensor, known: list[tuple[Tensor, int]]) -> int | None:
        operator = func.overloadpacket.__name__
        if operator in self._FIRST:
            return 1 if y.ndim > 1 else None
        if operator in self._LAST:
            return y.ndim - 1
        if not known:
            return None
        x, axis = known[0]
        if operator == "permute":
            return [dim % x.ndim for dim in args[1]].index(axis)
        if operator in ("transpose", "t"):
            first, second = (dim % x.ndim for dim in args[1:3]) if len(args) > 1 else (0, 1)
            return {first: second, second: first}.get(axis, axis)
        if operator in self._RESHAPES:
            return _reshaped_axis(x.shape, axis, y.shape)
        return next((axis for x, axis in known if x.ndim == y.ndim), None)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory: views of one place are one value, whatever Python object holds them."""
    return (x.untyped_storage()._cdata, x.storage_offset(), *x.shape, *x.stride())


def _reshaped_axis(shape: Sequence[int], axis: int, new_shape: Sequence[int]) -> int | None:
    """The axis of the new shape with the same size and the same number of positions before it."""
    outer = torch.Size(shape[:axis]).numel()
    for new_axis, size in enumerate(new_shape):
        if size == shape[axis] and torch.Size(new_shape[:new_axis]).numel() == outer:
            return new_axis
    return None
