"""The configurations of the fused chains that `aot` compiles.

Each kernel of a chain (a stretch of convolutions or linear layers that runs as one operator) is compiled with its default
launch for layers of known networks and for awkward sizes.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from fastentropy_kernels.aot.inspection import DTYPES, compiling_for
from fastentropy_kernels.chains import launch_triton
from fastentropy_kernels.chains.operators import Convolution, LinearPair


class Layer(NamedTuple):
    """The sizes of the tensors of a chain.

    Attributes:
        x: shape of the input.
        weight: shape of the first operator's weight.
        outputs: number of output channels or columns of the chain.
        groups: groups of the convolution; 1 for linear layers.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    outputs: int
    groups: int = 1


# The first layer of each kernel is from a known network. The second has sizes without alignment, which allow no wide accesses:
# each value is loaded from its own address. In the third, sizes of 1 become compile-time constants of the kernel.
LAYERS: dict[str, dict[str, Layer]] = {
    "pointwise": {
        "": Layer((64, 128, 28, 28), (128, 128, 3, 3), 512),  # a bottleneck of ResNet-50
        "7 x 7": Layer((64, 67, 7, 7), (67, 67, 3, 3), 515),
        "1 wide": Layer((3, 37, 7, 1), (5, 37, 3, 1), 37),
    },
    "depthwise pointwise": {
        "": Layer((64, 192, 28, 28), (192, 1, 3, 3), 64, groups=192),  # a block of MobileNetV2
        "7 x 7": Layer((64, 67, 7, 7), (67, 1, 7, 7), 515, groups=67),
        "1 wide": Layer((1, 37, 7, 1), (37, 1, 3, 1), 5, groups=37),
    },
    "bordered": {
        "": Layer((64, 64, 56, 56), (64, 64, 5, 5), 64),  # two convolutions of ResNet-18, merged
        "7 x 7": Layer((64, 67, 7, 7), (515, 67, 5, 5), 515),
        "1 wide": Layer((1, 3, 223, 1), (37, 3, 7, 1), 37),
    },
    "depthwise bordered": {
        "": Layer((64, 192, 28, 28), (192, 1, 5, 5), 192, groups=192),
        "7 x 7": Layer((64, 67, 7, 7), (67, 1, 7, 7), 67, groups=67),
        "1 wide": Layer((3, 37, 7, 1), (37, 1, 3, 1), 37, groups=37),
    },
    "linear pair": {
        "": Layer((8192, 768), (128, 768), 768),  # rows of a transformer
        "67 wide": Layer((8191, 67), (67, 67), 67),
        "1 row": Layer((1, 5), (3, 5), 37),
    },
}


class ChainVariant(NamedTuple):
    """One configuration of a kernel of fused chains.

    Attributes:
        kernel: a key of `LAYERS`.
        dtype: a key of `DTYPES`.
        size: a key of `LAYERS[kernel]`.
        channels_last: whether the images are channels-last; otherwise they are contiguous.
        everything: whether the chain has a residual and GELU, and also tap_bias and counts if the kernel takes them.
    """

    kernel: str
    dtype: str
    size: str
    channels_last: bool = False
    everything: bool = False

    @property
    def layer(self) -> Layer:
        """The sizes of the tensors."""
        return LAYERS[self.kernel][self.size]

    @property
    def note(self) -> str:
        """The difference from the plain configuration of the same kernel, in words."""
        notes = ("channels last" if self.channels_last else "", self.size, "everything" if self.everything else "")
        return ", ".join(filter(None, notes))

    def __str__(self) -> str:
        """Return the name of the configuration in one line."""
        return f"{self.kernel} {self.dtype} {self.note}".rstrip()


def chain_variants() -> list[ChainVariant]:
    """Return the configurations of all kernels of fused chains.

    They combine kernels, dtypes, sizes and memory formats, each with and without `everything`. The awkward sizes are combined
    with `everything` only. A configuration is left out if another one compiles to nearly the same code.

    Returns:
        A list of configurations.
    """
    return [
        ChainVariant(kernel, dtype, size, channels_last, everything)
        for kernel, sizes in LAYERS.items()
        for dtype, size, channels_last, everything in product(DTYPES, sizes, (False, True), (False, True))
        if not (channels_last and kernel == "linear pair")  # rows have no memory format
        and not (everything and dtype == "fp16")  # the code is that of bf16, but for the names of instructions
        and not (size and (dtype == "fp16" or not everything))
    ]


def compile_chain(variant: ChainVariant, arch: str) -> CompiledKernel:
    """Compile the kernel that `launch_triton` would launch for `variant`.

    The function of `launch_triton` is called on tensors of the meta device, which have no memory.

    Args:
        variant: the configuration.
        arch: a key of `TARGETS`, such as "sm_90".

    Returns:
        The compiled kernel.
    """
    x, weight, outputs, groups = variant.layer
    hidden, everything = weight[0], variant.everything

    def tensor(*shape: int, dtype: torch.dtype = DTYPES[variant.dtype]) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device="meta")
        in_format = len(shape) == 4 and (variant.channels_last or shape == weight)
        return made.contiguous(memory_format=torch.channels_last) if in_format else made

    operands = tensor(*x), tensor(*weight), tensor(hidden)
    second = tensor(outputs, hidden), tensor(outputs)
    activation = "gelu" if everything else "identity"
    with compiling_for(arch) as compiled:
        if variant.kernel == "linear pair":
            residual = tensor(*x[:-1], outputs) if everything else None
            launch_triton.linear_pair(LinearPair(*operands, *second), residual, activation)
            return compiled[0]
        # This padding gives y the size of x.
        convolution = Convolution(*operands, (1, 1), (weight[2] // 2, weight[3] // 2), (1, 1), groups)
        residual = tensor(x[0], outputs, *x[2:]) if everything else None
        if "pointwise" in variant.kernel:
            launch_triton.conv_pointwise(convolution, *second, residual, activation)
            return compiled[0]
        tap_bias = tensor(outputs, *weight[2:]) if everything else None
        counts = tensor(outputs, 3, dtype=torch.int64) if everything else None
        launch_triton.conv_bordered(convolution, tap_bias, residual, activation, counts)
    return compiled[0]
