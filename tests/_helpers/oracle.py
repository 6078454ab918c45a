"""A record of every rectifier call of a forward pass, made without any code of fastentropy.

A rectifier is an activation such as ReLU or GELU. `nn.Module.__call__` and the functions of PyTorch are patched while the pass
runs.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

from tests._helpers.counts import plain_counts

try:
    from timm.layers import activations as timm_activations
except ImportError:  # timm is optional
    timm_activations = None

_TORCH = "ReLU ReLU6 LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Softplus Hardswish Hardtanh"
_TRANSFORMERS = (
    "GELUActivation NewGELUActivation GELUTanh FastGELUActivation QuickGELUActivation ClippedGELUActivation "
    "AccurateGELUActivation MishActivation SiLUActivation ReLUSquaredActivation XIELUActivation"
)
_TIMM = "Swish Mish HardSwish HardMish GELU GELUTanh QuickGELU PReLU"
_FUNCTIONS = (
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu mish softplus hardswish "
    "hardtanh hardtanh_ prelu rrelu rrelu_"
)

RECTIFIERS: tuple[type[nn.Module], ...] = (
    *(getattr(nn, name) for name in _TORCH.split()),
    *(getattr(transformers.activations, name) for name in _TRANSFORMERS.split()),
    *(getattr(timm_activations, name) for name in _TIMM.split() if timm_activations),
)
PATCHED = [(owner, name) for owner in (nn.functional, torch, Tensor) for name in _FUNCTIONS.split() if hasattr(owner, name)]


@dataclass(frozen=True)
class Call:
    """One call of a rectifier.

    Attributes:
        name: the name that the call must have as a site, or None if the rules of naming do not determine one.
        axis: the axis of the input that holds the neurons.
        counts: the numbers of off, zero and on values of each neuron, int64 `[neurons, 3]`.
    """

    name: str | None
    axis: int
    counts: Tensor

    def __add__(self, other: "Call") -> "Call":
        """Return the call with the counts of two passes added up."""
        assert (self.name, self.axis) == (other.name, other.axis)
        return Call(self.name, self.axis, self.counts + other.counts)


def recorded_calls(model: nn.Module, run: Callable[[], object], widths: Mapping[str, int] | None = None) -> list[Call]:
    """Return the rectifier calls of one forward pass, in order.

    By default, a call has as many neurons as the output of the last module with weights has channels, or half as many, if the
    model splits off a gate.

    Args:
        model: the model.
        run: a function that runs the forward pass.
        widths: the number of neurons of calls for which the default is wrong, by a pattern (fnmatch) of the call's name.
    """
    calls: list[Call] = []

    def record(name: str, named: bool, x: Tensor, channels: int) -> None:
        width = next((width for pattern, width in (widths or {}).items() if fnmatchcase(name, pattern)), channels)
        axis = neuron_axis(x, width)
        calls.append(Call(name if named else None, axis, plain_counts(x, axis)))

    with observed_calls(model, record):
        run()
    return calls


@contextlib.contextmanager
def observed_calls(model: nn.Module, observe: Callable[[str, bool, Tensor, int], None]) -> Iterator[None]:
    """Call `observe(name, named, x, channels)` before each rectifier call of the `with` block.

    Args:
        model: the model that runs in the block.
        observe: the function to call. `name` is the name of the call, and `x` its input. `channels` is the number of output
            channels of the last module with weights. `named` is False if the name is a guess, because a function has the same
            path as a submodule, or because the called module is not part of the model.
    """
    paths = {module: path for path, module in model.named_modules()}
    running: list[nn.Module] = []  # modules of the model whose forward is running, the outermost first
    seen = Counter[str]()
    inside, channels = False, 0
    module_call = nn.Module.__call__

    @contextlib.contextmanager
    def rectifier(name: str, named: bool, x: Tensor) -> Iterator[None]:
        """Observe a call, unless it is made inside another rectifier, as part of its implementation."""
        nonlocal inside
        if inside:
            yield
            return
        again, seen[name] = seen[name], seen[name] + 1
        observe(f"{name}:{again}" if again else name, named, x.detach(), channels)
        inside = True
        try:
            yield
        finally:
            inside = False

    def name_of_call(what: str) -> str:
        return f"{paths[running[-1]]}.{what}".removeprefix(".")

    def call_module(module, *args, **kwargs):
        nonlocal channels
        if isinstance(module, RECTIFIERS):
            name = paths[module] if module in paths else name_of_call(type(module).__name__)
            with rectifier(name, module in paths, args[0] if args else kwargs["input"]):
                return module_call(module, *args, **kwargs)
        with running_in(module) if module in paths else contextlib.nullcontext():
            y = module_call(module, *args, **kwargs)
        channels = made_channels(module) or channels
        return y

    @contextlib.contextmanager
    def running_in(module: nn.Module) -> Iterator[None]:
        running.append(module)
        try:
            yield
        finally:
            running.pop()

    def patch(owner: object, name: str) -> mock._patch:
        function = getattr(owner, name)

        @functools.wraps(function)
        def call_function(*args, **kwargs):
            site = name_of_call(name.rstrip("_"))
            with rectifier(site, site not in paths.values(), args[0] if args else kwargs["input"]):
                return function(*args, **kwargs)

        return mock.patch.object(owner, name, call_function)

    with contextlib.ExitStack() as patches:
        for patched in [mock.patch.object(nn.Module, "__call__", call_module), *(patch(*place) for place in PATCHED)]:
            patches.enter_context(patched)
        yield


def made_channels(module: nn.Module) -> int | None:
    """Return the number of output channels of a module that owns a weight, or None if the module owns none."""
    weight = (module._parameters | module._buffers).get("weight")
    if weight is None:
        return None
    declared = (getattr(module, name, None) for name in ("out_channels", "out_features", "embedding_dim", "nf"))
    return next((channels for channels in declared if isinstance(channels, int)), weight.shape[0])


def neuron_axis(x: Tensor, channels: int) -> int:
    """Return the axis of the neurons: the only axis of `x` after the batch axis that has `channels` entries.

    If there is none, return the only axis with half as many entries. Raise AssertionError if no axis or several axes fit.
    """
    for size in (channels, channels / 2):
        axes = [axis for axis in range(1, x.ndim) if x.shape[axis] == size]
        if axes:
            assert len(axes) == 1, f"{size} channels fit several axes of {list(x.shape)}: choose another input size"
            return axes[0]
    raise AssertionError(f"{channels} channels fit no axis of {list(x.shape)}: name the call's width")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run the `with` block on one thread.

    Small inputs gain nothing from several threads, and on a busy machine threads that wait for each other take minutes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
