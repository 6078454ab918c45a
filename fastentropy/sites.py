"""Sites: the calls of rectifiers in a forward pass, their names, and which axis of their input holds the neurons."""

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from fastentropy.activations import activation_modules, activation_name

#: The attribute by which a watched forward keeps the original.
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
    watcher.attach()
    try:
        model.eval()
        model(*copy.deepcopy(example_inputs))  # a model may write over its inputs
    finally:
        watcher.detach()
        for module in training:
            module.training = True
    return list(watcher.sites.values())


class SiteWatcher:
    """Calls observe(site, x) with the input x of every activation call while attached, before the activation runs.

    The sites are discovered in the first complete forward pass. channel_axis names the neuron axis of sites where it should
    not be inferred from the operator that made their input.
    """

    def __init__(
        self,
        model: nn.Module,
        observe: Callable[[Site, Tensor], None],
        end_pass: Callable[[], None] = lambda: None,
        channel_axis: Mapping[str, int] | None = None,
    ) -> None:
        """Prepare to watch a model; end_pass is called after each complete forward pass."""
        self.sites: dict[str, Site] = {}
        self._model, self._modules = model, activation_modules(model)
        self._observe, self._end_pass = observe, end_pass
        self._channel_axis = dict(channel_axis or {})
        self._handles: list[RemovableHandle] = []
        self._depth, self._calls = 0, Counter[str]()
        self._tracker: AxisTracker | None = None
        self._discovered = False

    def attach(self) -> None:
        """Begin to watch. Raises RuntimeError where the model is being watched already."""
        if hasattr(self._model.forward, _WATCHED):
            raise RuntimeError("a collector is attached to this model already; detach it first")
        for name, module in self._modules.items():
            hook = functools.partial(self._before_activation, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._model.forward = self._watched(self._model.forward)

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            original = getattr(self._model.forward, _WATCHED)
            del self._model.forward
            if self._model.forward != original:
                self._model.forward = original
        self._handles.clear()

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            with self._forward_pass():
                return forward(*args, **kwargs)

        setattr(watched_forward, _WATCHED, forward)
        return watched_forward

    @contextlib.contextmanager
    def _forward_pass(self) -> Iterator[None]:
        """One call of the model; a call of the model from inside of it belongs to the same pass."""
        outermost = self._depth == 0
        if outermost:
            self._calls.clear()
            self._tracker = None if self._discovered else AxisTracker()
        self._depth += 1
        try:
            with self._tracker if outermost and self._tracker else contextlib.nullcontext():
                yield
        finally:
            self._depth -= 1
        if outermost:
            self._discovered, self._tracker = True, None
            self._end_pass()

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
        self._observe(self.sites[site_name], x.detach())

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
