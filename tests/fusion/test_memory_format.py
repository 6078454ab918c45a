"""Memory formats of tensors."""

import torch

from fastentropy.fusion.memory_format import is_channels_last, like_format


def test_channels_last_is_told_from_contiguous():
    last, last_3d = torch.channels_last, torch.channels_last_3d
    x, deep = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, 6)
    assert is_channels_last(x.contiguous(memory_format=last))
    assert is_channels_last(deep.contiguous(memory_format=last_3d))
    both = torch.randn(2, 1, 4, 5)  # with one channel, it is either
    assert not any(map(is_channels_last, (x, deep, x[0], both, torch.randn(2, 3), torch.randn(2, 3, 4))))
    assert like_format(x, x.contiguous(memory_format=last)).is_contiguous(memory_format=last)
    assert like_format(x.contiguous(memory_format=last), x).is_contiguous()
    assert like_format(x[0], x.contiguous(memory_format=last)).is_contiguous()
