"""The fused chains that `aot` compiles: each kernel in its default configuration, on layers of known networks."""

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
    """The sizes of the tensors of a chain."""

    x: tuple[int, ...]
    weight: tuple[int, ...]  # of the first operator
    outputs: int  # of the second, where there is one
    groups: int = 1


# The first layer of each kernel is from a known network. The second has no alignment, so that there are no wide accesses
# and every value has an address of its own. In the third, sizes of 1 become constants of the kernel.
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
    """What a chain kernel is compiled for."""

    kernel: str  # of LAYERS
    dtype: str  # of DTYPES
    size: str  # of LAYERS
    channels_last: bool = False
    everything: bool = False  # with a residual and GELU, and with tap_bias and counts where the kernel has them

    @property
    def layer(self) -> Layer:
        """The sizes of its tensors."""
        return LAYERS[self.kernel][self.size]

    @property
    def note(self) -> str:
        """What sets it apart from the other variants of its kernel, in words."""
        notes = ("channels last" if self.channels_last else "", self.size, "everything" if self.everything else "")
        return ", ".join(filter(None, notes))

    def __str__(self) -> str:
        """Return its name in one line."""
        return f"{self.kernel} {self.dtype} {self.note}".rstrip()


def chain_variants() -> list[ChainVariant]:
    """Return every kernel and size in both memory formats, alone and with everything, without what would be the same."""
    return [
        ChainVariant(kernel, dtype, size, channels_last, everything)
        for kernel, sizes in LAYERS.items()
        for dtype, size, channels_last, everything in product(DTYPES, sizes, (False, True), (False, True))
        if not (channels_last and kernel == "linear pair")  # rows have no formats
        and not (everything and dtype == "fp16")  # the code of bf16, with other instructions of the same size
        and not (size and (dtype == "fp16" or not everything))
    ]


def compile_chain(variant: ChainVariant, arch: str) -> CompiledKernel:
    """Compile the kernel that `launch_triton` launches for `variant`, by that launch, on tensors without memory."""
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
