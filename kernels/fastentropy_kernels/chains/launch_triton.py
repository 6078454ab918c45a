"""GPU: launches of the kernels of fused chains.

The table `LAUNCHES` says how large the tiles of a kernel are. A launch makes each tensor readable for its kernel, and copies a
tensor only if its memory format does not suit.
"""

# torch.cuda.device_of has no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.chains.conv_triton import conv_bordered_kernel, conv_pointwise_kernel
from fastentropy_kernels.chains.linear_triton import linear_pair_kernel
from fastentropy_kernels.chains.operators import Convolution, LinearPair
from fastentropy_kernels.layout import is_channels_last, largest_power_of_2


class Launch(NamedTuple):
    """How a kernel with input x and output y is tiled, and how its programs run.

    The first four attributes are block sizes. They are upper bounds, because smaller tensors get smaller blocks.

    Attributes:
        positions: how many positions of y each program computes: pixels of images, or rows of a linear layer's output.
        outputs: how many channels of y each program computes. For linear layers, how many columns it computes at a time.
        hidden: how many channels between the two operators a program computes at a time.
        inputs: how many channels of x a program sums over at a time.
        num_warps: warps of a program.
        num_stages: stages of Triton's software pipeline.
    """

    positions: int
    outputs: int
    hidden: int
    inputs: int
    num_warps: int
    num_stages: int


# The registers of a thread limit the size of a tile. They hold its sums. A "narrow" tensor (see NARROW) is loaded value by
# value, and the registers also hold a 64-bit address for each value. float32 is multiplied without matrix units, so the
# registers also hold the factors. The numbers come from an inspection of the compiled code (`aot`). None of them has been
# measured on a GPU yet.
LAUNCHES = {
    # As many outputs per program as possible (64 sums per thread), because each further block of outputs computes the
    # convolution again.
    "pointwise 16-bit": Launch(positions=64, outputs=256, hidden=32, inputs=32, num_warps=8, num_stages=3),
    "pointwise 16-bit narrow": Launch(positions=32, outputs=64, hidden=16, inputs=32, num_warps=8, num_stages=3),
    "pointwise float32": Launch(positions=64, outputs=64, hidden=16, inputs=16, num_warps=8, num_stages=2),
    "pointwise float32 narrow": Launch(positions=32, outputs=64, hidden=16, inputs=16, num_warps=8, num_stages=2),
    "depthwise pointwise 16-bit": Launch(positions=64, outputs=256, hidden=32, inputs=1, num_warps=8, num_stages=2),
    "depthwise pointwise 16-bit narrow": Launch(positions=32, outputs=64, hidden=32, inputs=1, num_warps=4, num_stages=2),
    "depthwise pointwise float32": Launch(positions=64, outputs=64, hidden=32, inputs=1, num_warps=8, num_stages=2),
    # Counting takes as many registers as the sums.
    "bordered 16-bit": Launch(positions=64, outputs=128, hidden=1, inputs=32, num_warps=8, num_stages=3),
    "bordered 16-bit narrow": Launch(positions=32, outputs=64, hidden=1, inputs=32, num_warps=8, num_stages=3),
    "bordered float32": Launch(positions=64, outputs=64, hidden=1, inputs=16, num_warps=8, num_stages=2),
    "bordered float32 narrow": Launch(positions=32, outputs=64, hidden=1, inputs=16, num_warps=8, num_stages=2),
    # One access of 16 bytes per thread and tap. The compiler unrolls the taps of a row. With two accesses for each tap, a
    # kernel of 5 x 5 would need more registers than there are.
    "depthwise bordered 16-bit": Launch(positions=32, outputs=64, hidden=1, inputs=1, num_warps=8, num_stages=2),
    "depthwise bordered float32": Launch(positions=32, outputs=64, hidden=1, inputs=1, num_warps=8, num_stages=2),
    # The hidden values are computed once, for any number of outputs. A block of outputs therefore only has to fit into the
    # registers beside them.
    "linear pair 16-bit": Launch(positions=64, outputs=64, hidden=128, inputs=32, num_warps=4, num_stages=3),
    "linear pair 16-bit narrow": Launch(positions=32, outputs=32, hidden=128, inputs=32, num_warps=8, num_stages=3),
    "linear pair float32": Launch(positions=32, outputs=32, hidden=128, inputs=16, num_warps=8, num_stages=2),
}

# A tensor is narrow if the size of its fastest axis is not a multiple of this. Contiguous images of 7 x 7 are narrow, those of
# 14 x 14 are not.
NARROW = 4

# tl.dot requires axes of at least 16.
SMALLEST_BLOCK = 16


def conv_pointwise(
    convolution: Convolution,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    launch: Launch | None = None,
) -> Tensor:
    """Return the same as `reference.conv_pointwise`, computed by one kernel.

    The other arguments are those of the reference. `launch` replaces the entry of LAUNCHES.
    """
    y = convolution.empty_output(pointwise_weight.shape[0])
    if y.numel() == 0:
        return y
    convolution = _arranged(convolution)
    x, weight, bias, *_, groups = convolution
    hidden = weight.shape[0]
    launch = launch or _launch("pointwise" if groups == 1 else "depthwise pointwise", x, hidden, _fastest(y))
    constants = _constants(convolution, y, activation, launch)
    # A launch goes to the current device, which may differ from the device of the tensor. For a CPU tensor this context does
    # nothing.
    with torch.cuda.device_of(x):
        conv_pointwise_kernel[_grid(y, constants)](
            *(x, weight, bias, _contiguous(pointwise_weight), _contiguous(pointwise_bias), _formatted(residual, y), y),
            *_sizes(convolution, y),
            *(hidden, y.shape[1], _parameters(activation)),
            BLOCK_HIDDEN=_block(hidden, launch.hidden),
            **constants,
        )
    return y


def conv_bordered(
    convolution: Convolution,
    tap_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    counts: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """Return the same as `reference.conv_bordered`, computed by one kernel.

    The other arguments are those of the reference, including `counts`, to which the counts are added. `launch` replaces the
    entry of LAUNCHES.
    """
    y = convolution.empty_output(convolution.weight.shape[0])
    if y.numel() == 0:
        return y
    convolution = _arranged(convolution)
    x, weight, bias, *_, groups = convolution
    launch = launch or _launch("bordered" if groups == 1 else "depthwise bordered", x, _fastest(y))
    constants = _constants(convolution, y, activation, launch)
    with torch.cuda.device_of(x):
        conv_bordered_kernel[_grid(y, constants)](
            *(x, weight, bias, _contiguous(tap_bias), _formatted(residual, y), y, counts),
            *_sizes(convolution, y),
            *(y.shape[1], _parameters(activation)),
            **constants,
        )
    return y


def linear_pair(pair: LinearPair, residual: Tensor | None, activation: str, launch: Launch | None = None) -> Tensor:
    """Return the same as `reference.linear_pair`, computed by one kernel.

    The other arguments are those of the reference. `launch` replaces the entry of LAUNCHES.
    """
    y = pair.empty_output()
    if y.numel() == 0:
        return y
    x, residual = _rows(pair.x), None if residual is None else _rows(residual)
    rows, outputs, (hidden, inputs) = x.shape[0], y.shape[-1], pair.weight1.shape
    launch = launch or _launch("linear pair", x, inputs, hidden, outputs)
    block_rows = _block(rows, launch.positions)
    with torch.cuda.device_of(x):
        linear_pair_kernel[(triton.cdiv(rows, block_rows),)](
            *(x, *map(_contiguous, pair[1:]), residual, y),
            *(rows, inputs, hidden, outputs, x.stride(0), 0 if residual is None else residual.stride(0)),
            _parameters(activation),
            ACTIVATION=activation,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTPUTS=_block(outputs, launch.outputs),
            BLOCK_HIDDEN=_block(hidden, launch.hidden),
            BLOCK_INPUTS=_block(inputs, launch.inputs),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
        )
    return y


def _arranged(convolution: Convolution) -> Convolution:
    """Return the convolution with x, weight and bias in a form that a kernel can read, copied only if necessary.

    The fastest axis of images (channels for channels-last, otherwise columns) must have no gaps. With `groups=1`, the fastest
    axis of the weight must be the inputs, because the kernel sums over them. A weight in channels-last satisfies this.
    """
    x, weight = convolution.x.resolve_neg(), convolution.weight.resolve_neg()
    if not is_channels_last(x) and x.stride(3) != 1:
        x = x.contiguous()
    if convolution.groups == 1 and weight.stride(1) != 1:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return convolution._replace(x=x, weight=weight, bias=_contiguous(convolution.bias))


def _launch(kernel: str, x: Tensor, *fastest: int) -> Launch:
    """Return the entry of LAUNCHES for a kernel and its tensors.

    Args:
        kernel: the first words of the key, such as "depthwise pointwise".
        x: the input. Its dtype selects the entry.
        *fastest: the sizes of the fastest axes of the tensors. The entry for narrow tensors is returned if one of them is
            narrow.
    """
    line = f"{kernel} {'float32' if x.dtype == torch.float32 else '16-bit'}"
    is_narrow = min(map(largest_power_of_2, fastest)) < NARROW
    return LAUNCHES.get(f"{line} narrow", LAUNCHES[line]) if is_narrow else LAUNCHES[line]


def _fastest(y: Tensor) -> int:
    """Return the size of the fastest axis of the images `y`: the channels for channels-last, otherwise the pixels."""
    return y.shape[1] if is_channels_last(y) else y.shape[2] * y.shape[3]


def _constants(convolution: Convolution, y: Tensor, activation: str, launch: Launch) -> dict[str, Any]:
    """Return the compile-time arguments that both kernels of convolutions have, and the options of the compiler."""
    x, weight, *_, groups = convolution
    pixels = y.shape[2] * y.shape[3]
    return {
        "ACTIVATION": activation,
        "KERNEL_HEIGHT": weight.shape[2],
        "KERNEL_WIDTH": weight.shape[3],
        "DEPTHWISE": groups > 1,
        "CHANNELS_LAST": is_channels_last(x),
        "PIXEL_MULTIPLE": largest_power_of_2(pixels),
        "BLOCK_POSITIONS": _block(y.shape[0] * pixels, launch.positions),
        "BLOCK_OUTPUTS": _block(y.shape[1], launch.outputs),
        "BLOCK_INPUTS": _block(x.shape[1], launch.inputs),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }


def _block(size: int, most: int) -> int:
    """Return the size of a block: `size` rounded up to a power of two, at most `most`, but at least SMALLEST_BLOCK."""
    block: int = max(SMALLEST_BLOCK, min(triton.next_power_of_2(size), most))
    return block


def _grid(y: Tensor, constants: dict[str, Any]) -> tuple[int]:
    """Return the number of programs of a kernel of convolutions, as a grid."""
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    blocks: int = triton.cdiv(positions, constants["BLOCK_POSITIONS"]) * triton.cdiv(y.shape[1], constants["BLOCK_OUTPUTS"])
    return (blocks,)


def _sizes(convolution: Convolution, y: Tensor) -> tuple[Any, ...]:
    """Return the kernel arguments from `positions` through `inputs`, which the two convolution kernels have in common."""
    x, weight, _, stride, padding, dilation, _ = convolution
    batch, _, height, width = y.shape
    pixels = height * width
    geometry = (tuple(x.shape[2:]), x.stride(), tuple(stride), tuple(padding), tuple(dilation))
    return (batch * pixels, pixels // largest_power_of_2(pixels), width, geometry, weight.stride(), x.shape[1])


def _parameters(activation: str) -> tuple[float, ...]:
    """Return the default parameters of an activation."""
    return tuple(ACTIVATIONS[activation].parameters.values())


def _formatted(residual: Tensor | None, y: Tensor) -> Tensor | None:
    """Return the residual in the memory format of `y`, copied only if necessary."""
    if residual is None:
        return None
    memory_format = torch.channels_last if is_channels_last(y) else torch.contiguous_format
    return residual.resolve_neg().contiguous(memory_format=memory_format)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor with the same values, or None for None. It is copied only if necessary."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _rows(x: Tensor) -> Tensor:
    """Return `x` as `[rows, features]` with feature stride 1: as a view if possible, otherwise as a copy."""
    rows = x.resolve_neg().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
