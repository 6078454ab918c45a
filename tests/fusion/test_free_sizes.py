"""Networks whose operators get a size in the place of a number: `fuse` gives up that chain, and not the call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import fuse
from tests._helpers.fusing import assert_equal
from tests._helpers.networks import Reads


def images(down):
    """A network of a convolution (3 to 8 channels), a function of its output and the input, and a convolution."""
    return Reads(lambda m, x: m.b(down(m.a(x), x)), a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 3, 3, padding=1))


def upsampled(m, x):
    """Restore the size of the input, as decoders do."""
    return m.b(m.a(x), output_size=x.shape[2:])


def unshuffled(m, x):
    """Begin as fast networks for super-resolution do."""
    return m.a(F.pixel_unshuffle(x, 2) * 2 - 1)


NETWORKS = {
    "output size": Reads(upsampled, a=nn.Conv2d(3, 8, 3, 2, 1), b=nn.ConvTranspose2d(8, 3, 3, 2, 1)),
    "channels": Reads(unshuffled, a=nn.Conv2d(12, 8, 3, padding=1)),
    "padding": Reads(
        lambda m, x: F.conv2d(m.a(x), m.b.weight, padding=(x.shape[2] // 2, 1)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 3, 3)
    ),
    "dilation": Reads(
        lambda m, x: F.conv2d(m.a(x), m.b.weight, dilation=x.shape[2] // 5), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 3, 3)
    ),
    "scale": images(lambda y, x: y / x.shape[2]),
    "shift": images(lambda y, x: x.shape[3] - y),
    "alpha": images(lambda y, x: torch.add(y, y, alpha=x.shape[3])),
    "lerp": images(lambda y, x: torch.lerp(y, y.sin(), 1 / x.shape[2])),
    "pool": images(lambda y, x: F.avg_pool2d(y, (x.shape[2] // 2, 2))),
    "pooled size": images(lambda y, x: F.adaptive_avg_pool2d(y, (x.shape[2] // 2, 3))),
    "crop": images(lambda y, x: y[:, :, : x.shape[2] // 2]),
    "expanded": images(lambda y, x: y.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dynamic_sizes", [False, True])
def test_sizes_in_the_place_of_numbers(name, dynamic_sizes):
    model = NETWORKS[name].eval()
    fused = fuse(model, (torch.randn(2, 3, 10, 12),), measure=False, dynamic_sizes=dynamic_sizes)
    assert_equal(fused, model, torch.randn(5, 3, 10, 12))
    if dynamic_sizes:
        assert_equal(fused, model, torch.randn(3, 3, 10 if name == "pool" else 12, 16))


def test_other_chains_are_fused():
    """Only the chain with the size is given up."""
    model = Reads(
        lambda m, x: m.d(m.c(m.b(m.a(x), output_size=x.shape[2:]).relu())),
        a=nn.Conv2d(3, 8, 3, 2, 1),
        b=nn.ConvTranspose2d(8, 3, 3, 2, 1),
        c=nn.Conv2d(3, 32, 1),
        d=nn.Conv2d(32, 3, 1),
    ).eval()
    fused = fuse(model, (torch.randn(2, 3, 10, 12),), measure=False, dynamic_sizes=True)
    assert [chain.names for chain in fused.report.chains] == [("c", "d")]
    assert fused.report.chains[0].choice == "merge"
    assert_equal(fused, model, torch.randn(3, 3, 14, 8))


MASKED = {
    "added": lambda m, x, keep, place: m.b(m.a(x[keep]) + place.sin()),
    "residual": lambda m, x, keep, place: m.b(y := m.a(x[keep])) + y,
    "reshaped": lambda m, x, keep, place: m.b(m.a(x[keep]).reshape(-1, 2, 2).flatten(1)),
    "number": lambda m, x, keep, place: m.b(m.a(x)) * keep.sum().item(),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("kept", [[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_sizes_that_follow_from_the_data(name, kept):
    model = Reads(MASKED[name], a=nn.Linear(8, 4), b=nn.Linear(4, 4)).eval()
    x, place = torch.randn(5, 8), torch.randn(4)
    fused = fuse(model, (x, torch.tensor(kept).bool(), place), measure=False)
    for other in ([1, 0, 0, 0, 0], [1, 1, 1, 0, 1]):
        assert_equal(fused, model, torch.randn(5, 8), torch.tensor(other).bool(), place)
