"""The cases of `fastentropy bench kernels`: the state kernels, the activation alone, a copy, and the baselines.

A state kernel counts the off (below zero), zero and on (above zero) values of each channel. A case is a group of operations
that are timed side by side.
"""

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

#: Numbers of values of a tensor, from tensors that fit into a cache to tensors that do not.
SIZES = {"cpu": (2**18, 2**20, 2**22, 2**24), "cuda": (2**20, 2**22, 2**24, 2**26, 2**28)}
#: Channels of a row: as in the hidden layers of a small transformer, and of a transformer with billions of parameters.
CHANNELS = {"cpu": 1024, "cuda": 4096}
#: Channels, height and width of images, as in the first stage of a ResNet.
PLANES = (64, 56, 56)
BASELINES = frozenset({"PyTorch counting", "torch.compile", "published procedure", "histogram observer"})
OPERATIONS = ("copy", "activation alone", "activation_states", "count_states", *sorted(BASELINES))


class Layout(NamedTuple):
    """A memory layout of a tensor: rows `[rows, channels]` or planes `[images, channels, height, width]`.

    Attributes:
        name: "rows" or "planes".
        shape: a function from the number of values and the type of device ("cpu" or "cuda") to the shape of a tensor.
        channel_axis: the axis of the channels.
    """

    name: str
    shape: Callable[[int, str], tuple[int, ...]]
    channel_axis: int


LAYOUTS = (
    Layout("rows", lambda size, device: (max(1, size // CHANNELS[device]), CHANNELS[device]), -1),
    Layout("planes", lambda size, device: (max(1, round(size / (64 * 56 * 56))), *PLANES), 1),
)
#: The activations that are measured: ReLU as in convolutional networks, and SiLU as in decoders.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "silu": F.silu}


def kernel_cases(device: torch.device, dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> Iterator[Case]:
    """Yield the cases: relu in both layouts at every size, and silu in rows at the largest size.

    The baselines are measured for relu at the largest size only. On a GPU, the other operations run as CUDA graphs. Some of the
    baselines synchronise with the GPU and cannot be captured, so there is another case with all operations as eager calls.

    Args:
        device: the device to run on.
        dtypes: the dtypes of the tensors.
        sizes: the numbers of values of a tensor; if empty, `SIZES`.
    """
    sizes = sorted(sizes or SIZES[device.type])
    for dtype in dtypes:
        for layout in LAYOUTS:
            by_shape = {layout.shape(size, device.type): size for size in sizes}  # small sizes may be rounded to the same shape
            for size in by_shape.values():
                yield from _ways(kernel_case(device, dtype, layout, size, "relu"), device, with_baselines=size == sizes[-1])
        yield from _ways(kernel_case(device, dtype, LAYOUTS[0], sizes[-1], "silu"), device, with_baselines=False)


def _ways(case: Case, device: torch.device, *, with_baselines: bool) -> Iterator[Case]:
    """Yield the variants of a case that are measured: on a GPU as CUDA graphs, otherwise as eager calls.

    The caller must keep no reference to the case, because its tensors are to be freed before the next case is made.

    Args:
        case: the case with all operations, as eager calls.
        device: the device of the case.
        with_baselines: whether to measure the baselines too. On a GPU they make a second variant, as eager calls.
    """
    if device.type == "cuda":
        yield _as_graphs(case, device)
        if with_baselines:
            yield case
    else:
        yield case if with_baselines else _without_baselines(case)


def kernel_case(device: torch.device, dtype: torch.dtype, layout: Layout, size: int, activation: str) -> Case:
    """Return a case with all `OPERATIONS` on one random tensor, as eager calls.

    Args:
        device: the device of the tensor.
        dtype: the dtype of the tensor.
        layout: the layout of the tensor, which determines its shape.
        size: the approximate number of values of the tensor.
        activation: a key of `ACTIVATIONS`.
    """
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
    """Return the case with each operation captured as a CUDA graph, on the GPU `gpu`.

    The baselines are left out, because some of them synchronise with the GPU and cannot be captured.
    """
    facts = {name: {**each, "cuda_graph": True} for name, each in case.facts.items()}
    return dataclasses.replace(_without_baselines(case), name=f"{case.name}, CUDA graphs", facts=facts, graphs_on=gpu)


def _operations(x: Tensor, channel_axis: int, activation: str) -> dict[str, Callable[[], object]]:
    """Return the operations on one tensor, by name. Each baseline runs the activation and counts; `count_states` only counts.

    Args:
        x: the values, of any shape.
        channel_axis: the axis of `x` that holds the channels.
        activation: a key of `ACTIVATIONS`.
    """
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
