"""The cases of `fastentropy bench kernels`: the state kernels, the activation alone, a copy, and the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastentropy.benchmarks.baselines import (
    activate_and_count,
    compiled,
    count_in_pytorch,
    histogram_observer,
    published_entropy,
)
from fastentropy.benchmarks.measurements import Case, name_case, name_dtype
from fastentropy_kernels import activation_states, count_states

#: Values per tensor, from what fits into a cache to what does not.
SIZES = {"cpu": (2**18, 2**20, 2**22, 2**24), "cuda": (2**20, 2**22, 2**24, 2**26, 2**28)}
#: Channels of a row, as in hidden layers: of a small transformer, and of one with billions of parameters.
CHANNELS = {"cpu": 1024, "cuda": 4096}
#: Channels and size of planes, as in the first stage of a ResNet.
PLANES = (64, 56, 56)
BASELINES = frozenset({"PyTorch counting", "torch.compile", "published procedure", "histogram observer"})
OPERATIONS = ("copy", "activation alone", "activation_states", "count_states", *sorted(BASELINES))


class Layout(NamedTuple):
    """A memory layout: the shape for a number of values on a type of device, and the axis of the channels."""

    name: str
    shape: Callable[[int, str], tuple[int, ...]]
    channel_axis: int


LAYOUTS = (
    Layout("rows", lambda size, device: (max(1, size // CHANNELS[device]), CHANNELS[device]), -1),
    Layout("planes", lambda size, device: (max(1, round(size / (64 * 56 * 56))), *PLANES), 1),
)
#: Activations of convolutional networks and of decoders.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "silu": F.silu}


def kernel_cases(device: torch.device, dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> Iterator[Case]:
    """Yield relu in both layouts at every size, by default `SIZES`, and silu in rows at the largest size.

    The baselines run at the largest size only. On a GPU, our operations run as CUDA graphs. The baselines wait for the GPU, so
    they run as eager calls, and our operations once more with them.
    """
    sizes = sorted(sizes or SIZES[device.type])
    for dtype in dtypes:
        for layout in LAYOUTS:
            by_shape = {layout.shape(size, device.type): size for size in sizes}  # small sizes may be rounded to the same shape
            for size in by_shape.values():
                yield from _ways(kernel_case(device, dtype, layout, size, "relu"), device, with_baselines=size == sizes[-1])
        yield from _ways(kernel_case(device, dtype, LAYOUTS[0], sizes[-1], "silu"), device, with_baselines=False)


def _ways(case: Case, device: torch.device, *, with_baselines: bool) -> Iterator[Case]:
    """Yield a case as it is measured. Nothing else refers to its tensors, so that they are freed before the next case."""
    if device.type == "cuda":
        yield _as_graphs(case, device)
        if with_baselines:
            yield case
    else:
        yield case if with_baselines else _without_baselines(case)


def kernel_case(device: torch.device, dtype: torch.dtype, layout: Layout, size: int, activation: str) -> Case:
    """Return all `OPERATIONS` on one random tensor of about `size` values, as eager calls."""
    shape = layout.shape(size, device.type)
    x = torch.randn(shape, device=device, dtype=dtype)
    operations = _operations(x, layout.channel_axis, activation)
    facts = {
        "layout": layout.name,
        "dtype": name_dtype(dtype),
        "activation": activation,
        "shape": list(shape),
        "values": x.numel(),
        "cuda_graph": False,
    }
    return Case(
        name_case(f"{activation} on {layout.name}", shape, dtype),
        operations,
        denominator="activation alone",
        sizes={name: (1 if name == "count_states" else 2) * x.nbytes for name in operations},
        roof="copy",
        facts=dict.fromkeys(operations, facts),
        baselines=BASELINES,
    )


def _without_baselines(case: Case) -> Case:
    own = {name: operation for name, operation in case.operations.items() if name not in case.baselines}
    return dataclasses.replace(case, operations=own, baselines=frozenset())


def _as_graphs(case: Case, gpu: torch.device) -> Case:
    """Return the case of the operations that do not wait for the GPU, as CUDA graphs."""
    facts = {name: {**each, "cuda_graph": True} for name, each in case.facts.items()}
    return dataclasses.replace(_without_baselines(case), name=f"{case.name}, CUDA graphs", facts=facts, graphs_on=gpu)


def _operations(x: Tensor, channel_axis: int, activation: str) -> dict[str, Callable[[], object]]:
    """Return everything that is measured on one tensor. Each baseline also runs the activation, unlike `count_states`."""
    counts = torch.zeros(x.shape[channel_axis], 3, dtype=torch.int64, device=x.device)
    function = ACTIVATIONS[activation]
    activate = partial(function, x)

    def after(count: Callable[[], object]) -> Callable[[], object]:
        return lambda: (activate(), count())

    return {
        "copy": x.clone,
        "activation alone": activate,
        "activation_states": partial(activation_states, x, counts, activation, channel_axis=channel_axis),
        "count_states": partial(count_states, x, counts, channel_axis=channel_axis),
        "PyTorch counting": after(partial(count_in_pytorch, x, counts, channel_axis)),
        "torch.compile": partial(compiled(activate_and_count), function, x, counts, channel_axis),
        "published procedure": after(partial(published_entropy, x, neurons_last=channel_axis == -1)),
        "histogram observer": after(partial(histogram_observer(x.device), x)),
    }
