"""The cases of `fastentropy bench collect`: inference while statistics are collected, plain inference, and the baselines.

A case is a group of operations that are timed side by side. The operations of a case run the same network on the same batch.
Each operation uses another procedure to observe the activations.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from fastentropy.benchmarks.baselines import compiled, count_in_pytorch, histogram_observer, published_entropy
from fastentropy.benchmarks.measurements import Case, name_case
from fastentropy.benchmarks.memory import peak_bytes
from fastentropy.benchmarks.networks import Network, infer, llama, moved, small_llama, vision
from fastentropy.collector.api import collect
from fastentropy.sites.activations import activation_modules
from fastentropy.surgery.isolation import copy_sharing_tensors

#: Networks and their default batch sizes, by type of device.
NETWORKS = {
    "cpu": {"resnet18": 16, "mobilenet_v2": 16, "vgg16_bn": 16, "swin_t": 16, "vit_b_16": 4, "small llama": 16},
    "cuda": {"resnet18": 256, "llama": 8},
}
_LLAMAS = {"llama": llama, "small llama": small_llama}
#: The class of models for whose 4-dimensional values the published code takes the neurons from the last axis.
_NEURONS_LAST = "SwinTransformer"


def collect_cases(device: torch.device, dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of each network, dtype and batch size.

    Args:
        device: the device to run on.
        dtypes: the dtypes of the weights and inputs.
        sizes: the batch sizes; if empty, the default batch size of each network.
    """
    for name, batch in NETWORKS[device.type].items():
        for dtype in dtypes:
            for size in sizes or [batch]:
                network = _network(name, size, device, dtype)
                yield from network_cases(name, network, device)
                yield from compiled_cases(name, network)
                del network
                gc.collect()  # hooks and their model refer to each other; free the memory for the next one


def _network(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> Network:
    torch.manual_seed(0)
    with device:
        return moved(_LLAMAS[name](batch) if name in _LLAMAS else vision(name, batch), device, dtype)


def network_cases(name: str, network: Network, device: torch.device) -> Iterator[Case]:
    """Yield the cases of one network: all procedures as eager calls and, on a GPU, two of them as CUDA graphs.

    Run each case before the next one is requested. The hooks of the procedures are active only until the iterator ends.

    Args:
        name: the name of the network.
        network: the model and its inputs.
        device: the device of the model and the inputs.
    """
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
        yield Case(title, operations, denominator="plain", facts=facts, baselines=BASELINES)
        if device.type == "cuda":
            graphs = {procedure: operations[procedure] for procedure in ("plain", "collecting")}
            yield Case(f"{title}, CUDA graphs", graphs, denominator="plain", graphs_on=device)


def compiled_cases(name: str, network: Network) -> Iterator[Case]:
    """Yield the case of one network under torch.compile: plain, while collecting, and with hooks that are compiled too.

    Another operation is the network in eager mode while collecting. Collectors stay attached while the other operations run,
    which have models of their own. The arguments and the iterator are as in `network_cases`.
    """
    model, inputs = network
    title = name_case(name, inputs[0].shape, next(model.parameters()).dtype)
    with contextlib.ExitStack() as stack:
        operations = {}
        for operation, (procedure, is_compiled) in COMPILED.items():
            run = stack.enter_context(PROCEDURES[procedure](_with_own_class(copy_sharing_tensors(model))))
            operations[operation] = partial(infer, torch.compile(run) if is_compiled else run, inputs)
        for operation in ("plain", "collecting"):
            for _ in range(3):  # a collector finds the sites in the first pass, and the second one compiles
                operations[operation]()
        yield Case(f"{title}, compiled", operations, denominator="plain", baselines=BASELINES)


def _with_own_class(model: nn.Module) -> nn.Module:
    """Give a model a class of its own, and return the model.

    What PyTorch has compiled for a module it also uses for others of the class, even if they have hooks, which then do not run.
    """
    model.__class__ = type(type(model).__name__, (type(model),), {})
    return model


def _two_passes(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run the model twice while collecting statistics. The first pass allocates the counters, and the second reuses them."""
    with collect(model):
        infer(model, inputs)
        infer(model, inputs)


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[nn.Module]:
    yield model


@contextlib.contextmanager
def _collecting(model: nn.Module) -> Iterator[nn.Module]:
    with collect(model):
        yield model


@contextlib.contextmanager
def _published(model: nn.Module) -> Iterator[Callable[..., object]]:
    """Yield a function that runs the model as the published code of EASIER does (VGCQ/EASIER, main.py, train.py, utils.py).

    A hook on each activation keeps the input of every call until the whole batch has passed through the model. Then the entropy
    of each input is computed. The activations are set to out-of-place, because the inputs must not be overwritten.
    """
    for module in activation_modules(model).values():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment] # mypy knows only tensors and modules as attributes
    inputs: list[Tensor] = []
    neurons_last = _neurons_last(model)

    def run(*batch: Tensor) -> object:
        y = model(*batch)
        for x in inputs:
            published_entropy(x, neurons_last=neurons_last(x))
        inputs.clear()
        return y

    _hook(model, lambda name, x: inputs.append(x))
    yield run


@contextlib.contextmanager
def _counting_hooks(count: Callable[[Tensor, Tensor, int], object], model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model with a hook before each activation module that adds to the counts of the module.

    Args:
        count: a function that is called as `count(x, counts, channel_axis)` with the input of the activation, and with counts
            (int64 `[neurons, 3]`) to which it adds in place.
        model: the model.
    """
    counts: dict[str, Tensor] = {}
    neurons_last = _neurons_last(model)

    def count_input(name: str, x: Tensor) -> None:
        axis = -1 if neurons_last(x) else 1
        if name not in counts:
            counts[name] = torch.zeros(x.shape[axis], 3, dtype=torch.int64, device=x.device)
        count(x, counts[name], axis)

    _hook(model, count_input)
    yield model


@contextlib.contextmanager
def _observers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model with a hook before each activation module that passes its input to PyTorch's histogram observer."""
    observers: dict[str, Callable[[Tensor], object]] = {}

    def observe(name: str, x: Tensor) -> None:
        observers.setdefault(name, histogram_observer(x.device))(x)

    _hook(model, observe)
    yield model


def _hook(model: nn.Module, call: Callable[[str, Tensor], None]) -> None:
    """Register a hook that calls `call(name, input)` before each activation module of the model runs.

    The hooks refer to no modules: code that is compiled while a collector is attached to another model may use its own only.
    """
    for name, module in activation_modules(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: call(name, args[0]))


def _neurons_last(model: nn.Module) -> Callable[[Tensor], bool]:
    """Return a function that returns whether the neurons of an input of the model's activations lie along its last axis."""
    always = type(model).__name__ == _NEURONS_LAST
    return lambda x: always or x.ndim == 3


def _compiled_count(x: Tensor, counts: Tensor, channel_axis: int) -> None:
    compiled(count_in_pytorch, dynamic=True)(x, counts, channel_axis)


#: The procedures by name. Each is a context manager that takes a model and yields a callable that runs the model with the
#: procedure. It may change the model, so each procedure gets its own copy.
PROCEDURES: dict[str, Callable[[nn.Module], AbstractContextManager[Callable[..., object]]]] = {
    "plain": _plain,
    "collecting": _collecting,
    "published procedure": _published,
    "PyTorch hooks": partial(_counting_hooks, count_in_pytorch),
    "compiled hooks": partial(_counting_hooks, _compiled_count),
    "histogram observer": _observers,
}
BASELINES = frozenset({"PyTorch hooks", "compiled hooks", "histogram observer"})

#: The operations of a compiled case: the name of the procedure, and whether the network is compiled.
COMPILED = {
    "plain": ("plain", True),
    "collecting": ("collecting", True),
    "collecting, eager": ("collecting", False),
    "compiled hooks": ("PyTorch hooks", True),
}
