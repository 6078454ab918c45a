"""The first operators of a chain: a convolution or two linear layers, each in one tuple with all its tensors and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy_kernels.layout import is_channels_last


class Convolution(NamedTuple):
    """A convolution of images: the arguments of `torch.nn.functional.conv2d`, in the same order."""

    x: Tensor  # [batch, in, height, width]
    weight: Tensor  # [channels, in / groups, kernel height, kernel width]
    bias: Tensor | None  # [channels]
    stride: Sequence[int]  # along height and width; padding and dilation, too
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def output_size(self) -> tuple[int, int]:
        """Return the height and width of the output."""
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                self.x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )
        return height, width

    def empty_output(self, channels: int) -> Tensor:
        """Return uninitialised memory for the output, with the dtype, device and memory format of `x`.

        Args:
            channels: number of channels of the output. It differs from that of the weight if a second operator follows.
        """
        memory_format = torch.channels_last if is_channels_last(self.x) else torch.contiguous_format
        shape = (self.x.shape[0], channels, *self.output_size())
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=memory_format)


class LinearPair(NamedTuple):
    """An input and two linear layers, which are applied to it one after the other."""

    x: Tensor  # [..., in]
    weight1: Tensor  # [hidden, in]
    bias1: Tensor | None  # [hidden]
    weight2: Tensor  # [out, hidden]
    bias2: Tensor | None  # [out]

    def empty_output(self) -> Tensor:
        """Return uninitialised memory for the output, `[..., out]`, with the dtype and device of `x`."""
        return self.x.new_empty((*self.x.shape[:-1], self.weight2.shape[0]))
