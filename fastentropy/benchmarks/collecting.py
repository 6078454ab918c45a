"""Inference while collecting against plain inference, beside what people would use instead."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

import fastentropy as fe
from fastentropy.benchmarks.baselines import compiled, count_in_pytorch, histogram_observer, published_entropy
from fastentropy.benchmarks.measurements import Case, name_case
from fastentropy.benchmarks.memory import peak_bytes
from fastentropy.benchmarks.networks import Network, infer, llama, moved, vision
from fastentropy.sites.activations import activation_modules
from fastentropy.surgery.isolation import copy_sharing_tensors

#: Networks and the rows of a batch, by device.
NETWORKS = {
    "cpu": {"resnet18": 16, "mobilenet_v2": 16, "vgg16_bn": 16, "swin_t": 16},
    "cuda": {"resnet18": 256, "llama": 8},
}
#: The architecture whose neurons the published code takes from the last axis of images.
_NEURONS_LAST = "SwinTransformer"


def collect_cases(device: torch.device, dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> Iterator[Case]:
    """Yield each network for each dtype and batch size (none: its own); on a GPU as eager calls, then as CUDA graphs."""
    for name, batch in NETWORKS[device.type].items():
        for dtype in dtypes:
            for size in sizes or [batch]:
                yield from network_cases(name, _network(name, size, device, dtype), device)
                gc.collect()  # hooks and their model hold each other; its memory is for the next one


def _network(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> Network:
    torch.manual_seed(0)
    with device:
        return moved(llama(batch) if name == "llama" else vision(name, batch), device, dtype)


def network_cases(name: str, network: Network, device: torch.device) -> Iterator[Case]:
    """Yield the ways to run one network that are measured side by side; each lasts until the next is asked for."""
    model, inputs = network
    title = name_case(name, inputs[0].shape, next(model.parameters()).dtype)
    with contextlib.ExitStack() as stack:
        operations = {}
        for procedure, enter in PROCEDURES.items():
            run = stack.enter_context(enter(copy_sharing_tensors(model)))
            operations[procedure] = partial(infer, run, inputs)
        alike = ("plain", "published procedure")
        facts = {name: {"peak_bytes": peak_bytes(operations[name], device)} for name in alike}
        facts["collecting"] = {"peak_bytes": peak_bytes(partial(_two_passes, model, inputs), device)}
        yield Case(title, operations, baseline="plain", facts=facts, peers=PEERS)
        if device.type == "cuda":
            graphs = {procedure: operations[procedure] for procedure in ("plain", "collecting")}
            yield Case(f"{title}, CUDA graphs", graphs, baseline="plain", graphs_on=device)


def _two_passes(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The first makes the counters, the second has them from its beginning."""
    with fe.collect(model):
        infer(model, inputs)
        infer(model, inputs)


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[nn.Module]:
    yield model


@contextlib.contextmanager
def _collecting(model: nn.Module) -> Iterator[nn.Module]:
    with fe.collect(model):
        yield model


@contextlib.contextmanager
def _published(model: nn.Module) -> Iterator[Callable[..., object]]:
    """Inference as in EASIER's code (VGCQ/EASIER, main.py, train.py and utils.py).

    A hook on each activation keeps the input of every call until the whole batch has passed; then comes one entropy per call.
    Activations are out-of-place, so that their inputs are still there.
    """
    for module in activation_modules(model).values():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment] # of modules only tensors and modules are known
    inputs: list[Tensor] = []

    def run(*batch: Tensor) -> object:
        y = model(*batch)
        for x in inputs:
            published_entropy(x, neurons_last=_neurons_last(model, x))
        inputs.clear()
        return y

    _hook(model, lambda module, x: inputs.append(x))
    yield run


@contextlib.contextmanager
def _counting_hooks(count: Callable[[Tensor, Tensor, int], object], model: nn.Module) -> Iterator[nn.Module]:
    """A hook before each activation that adds to its counts."""
    counts: dict[nn.Module, Tensor] = {}

    def count_input(module: nn.Module, x: Tensor) -> None:
        axis = -1 if _neurons_last(model, x) else 1
        if module not in counts:
            counts[module] = torch.zeros(x.shape[axis], 3, dtype=torch.int64, device=x.device)
        count(x, counts[module], axis)

    _hook(model, count_input)
    yield model


@contextlib.contextmanager
def _observers(model: nn.Module) -> Iterator[nn.Module]:
    """PyTorch's histogram observer on the input of each activation."""
    observers: dict[nn.Module, Callable[[Tensor], object]] = {}

    def observe(module: nn.Module, x: Tensor) -> None:
        observers.setdefault(module, histogram_observer(x.device))(x)

    _hook(model, observe)
    yield model


def _hook(model: nn.Module, call: Callable[[nn.Module, Tensor], None]) -> None:
    """Call before each activation, with the module and its input."""
    for module in activation_modules(model).values():
        module.register_forward_pre_hook(lambda module, args: call(module, args[0]))


def _neurons_last(model: nn.Module, x: Tensor) -> bool:
    return x.ndim == 3 or type(model).__name__ == _NEURONS_LAST


def _compiled_count(x: Tensor, counts: Tensor, channel_axis: int) -> None:
    with torch.compiler.set_stance("default"):  # the collector of another procedure lets nothing compiled run
        compiled(count_in_pytorch, dynamic=True)(x, counts, channel_axis)


PROCEDURES: dict[str, Callable[[nn.Module], AbstractContextManager[Callable[..., object]]]] = {
    "plain": _plain,
    "collecting": _collecting,
    "published procedure": _published,
    "PyTorch hooks": partial(_counting_hooks, count_in_pytorch),
    "compiled hooks": partial(_counting_hooks, _compiled_count),
    "histogram observer": _observers,
}
"""Each is a context in which its model runs, which it may change: the model that it is given is its own."""
PEERS = frozenset({"PyTorch hooks", "compiled hooks", "histogram observer"})
