"""Networks with chains (stretches of linear operators) of every kind, and the chains that must be found in them.

Most networks are given by a forward function of a few modules.
"""

import torch
from torch import nn

from tests._helpers.networks import Reads

IMAGES = torch.randn(2, 4, 6, 6)
ROWS = torch.randn(2, 3, 4)


def conv2d(channels=4, **options):
    """Return a 3×3 convolution from 4 to `channels` channels that keeps the spatial size."""
    return nn.Conv2d(4, channels, 3, padding=1, **options)


def image_network(forward, **modules):
    """Return a network for images `[batch, 4, 6, 6]`, with convolutions `a`, `b` and `whole`, a batch norm and two ReLU.

    Args:
        forward: the forward of the network: `forward(network, x)`.
        modules: further modules, which become attributes of the network.
    """
    modules |= {"whole": nn.Conv2d(4, 4, 6), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(), "relu_": nn.ReLU(inplace=True)}
    return Reads(forward, a=conv2d(), b=conv2d(), **modules)


def row_network(forward, **constants):
    """Return a network for rows `[..., 4]`, with linear layers `a`, `b` and `c`, and a batch norm `norm`.

    Args:
        forward: the forward of the network: `forward(network, x)`.
        constants: tensors, which become buffers of the network.
    """
    model = Reads(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 4), c=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    for name, value in constants.items():
        model.register_buffer(name, value)
    return model


class LayerScale(nn.Module):
    """Multiply each channel (axis 1 of 4) by a parameter, as torchvision's ConvNeXt does.

    Args:
        first: whether the parameter is the left operand of the multiplication.
    """

    def __init__(self, first=True):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.first = first

    def forward(self, x):
        return self.scale * x if self.first else x * self.scale


class Conv1D(nn.Module):
    """A linear layer as in GPT-2, which calls `addmm` on rows with all axes but the last flattened."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], len(self.bias))


#: For each description, a network, an input, and for each of its chains the names of the operators.
NETWORKS = {
    "GPT-2's MLP": (nn.Sequential(Conv1D(4, 8), Conv1D(8, 4)), ROWS, [("0", "1")]),
    "GPT-2's MLP with an activation": (nn.Sequential(Conv1D(4, 8), nn.GELU(), Conv1D(8, 4)), ROWS, [("0",), ("2",)]),
    "a residual around GPT-2's MLP": (
        Reads(lambda m, x: m.b(m.a(x)) + x, a=Conv1D(4, 8), b=Conv1D(8, 4)),
        ROWS,
        [("a", "b")],
    ),
    "matmul with a constant": (row_network(lambda m, x: m.a(x) @ m.m, m=torch.randn(5, 3)), ROWS, [("a", "m")]),
    "mm with a constant": (row_network(lambda m, x: torch.mm(x, m.m), m=torch.randn(4, 3)), ROWS[0], [("m",)]),
    "rows in another order": (row_network(lambda m, x: m.b(m.a(x).transpose(0, 1))), ROWS, [("a", "b")]),
    "another number of features": (row_network(lambda m, x: m.c(m.a(x).reshape(6, 5)[:, :4])), ROWS, [("a", "c")]),
    "features that are regrouped": (
        row_network(lambda m, x: m.c(m.c(x).reshape(2, 6, 2).reshape(2, 3, 4))),
        ROWS,
        [("c", "c")],
    ),
    "rows that stay flattened": (row_network(lambda m, x: m.b(m.a(x.reshape(6, 4)))), ROWS, [("a", "b")]),
    "rows that are regrouped": (
        row_network(lambda m, x: m.b(m.a(x.reshape(6, 4)).reshape(3, 2, 5))),
        ROWS,
        [("a", "b")],
    ),
    "rows that are regrouped at last": (row_network(lambda m, x: m.b(m.a(x)).reshape(6, 4)), ROWS, [("a", "b")]),
    "rows with a new axis": (row_network(lambda m, x: m.b(m.a(x).view(2, 1, 3, 5))), ROWS, [("a", "b")]),
    "a branch that is regrouped": (
        row_network(lambda m, x: m.b(m.a(x)).reshape(6, 4) + x.reshape(6, 4)),
        ROWS,
        [("a", "b")],
    ),
    "a branch that comes back": (
        row_network(lambda m, x: m.b(m.a(x.reshape(6, 4))).reshape(2, 3, 4) + x),
        ROWS,
        [("a", "b")],
    ),
    "a scale of features": (row_network(lambda m, x: m.c(x) * m.v, v=torch.randn(4)), ROWS, [("c",)]),
    "a position embedding": (row_network(lambda m, x: m.a(m.c(x) + m.p), p=torch.randn(3, 4)), ROWS, [("c",), ("a",)]),
    "batch norm of rows": (row_network(lambda m, x: m.a(m.norm(m.c(x.reshape(6, 4))))), ROWS, [("c", "a")]),
    "a classifier": (
        nn.Sequential(conv2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 5), nn.Linear(5, 3)),
        IMAGES,
        [("0", "4", "5")],
    ),
    "a classifier of positions": (
        nn.Sequential(conv2d(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.Dropout(), nn.Linear(5, 3)),
        IMAGES,
        [("0", "3", "5")],
    ),
    "a classifier of a 1-d value": (
        nn.Sequential(nn.Conv1d(4, 5, 3), nn.Flatten(), nn.Linear(35, 3)),
        torch.randn(2, 4, 9),
        [("0", "2")],
    ),
    "a classifier of volumes": (
        nn.Sequential(nn.Conv3d(2, 3, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2)),
        torch.randn(2, 2, 3, 3, 3),
        [("0", "3")],
    ),
    "a classifier with batch norm": (
        nn.Sequential(conv2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        IMAGES,
        [("0", "4")],
    ),
    "batch norm of flattened positions": (
        nn.Sequential(conv2d(), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 3)),
        IMAGES,
        [("0",), ("3",)],
    ),
    "flattened by reshape": (
        Reads(lambda m, x: m.b(m.a(x).reshape(x.shape[0], -1)), a=conv2d(), b=nn.Linear(144, 3)),
        IMAGES,
        [("a", "b")],
    ),
    "flattened in part": (Reads(lambda m, x: m.b(m.a(x).flatten(2)), a=conv2d(), b=nn.Linear(36, 3)), IMAGES, [("a",), ("b",)]),
    "flattened with the batch": (
        Reads(lambda m, x: m.b(m.a(x).flatten(0, 2)), a=conv2d(), b=nn.Linear(6, 3)),
        IMAGES,
        [("a",), ("b",)],
    ),
    "the mean of the positions": (
        Reads(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv2d(), b=nn.Linear(4, 3)),
        IMAGES,
        [("a", "b")],
    ),
    "the mean that keeps its axes": (
        Reads(lambda m, x: m.b(m.a(x).mean((-2, -1), keepdim=True)), a=conv2d(), b=nn.Conv2d(4, 3, 1)),
        IMAGES,
        [("a", "b")],
    ),
    "the mean of the rows": (
        Reads(lambda m, x: m.b(m.a(x).mean(1)), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
        ROWS,
        [("a",), ("b",)],
    ),
    "a linear layer along the last axis": (
        Reads(lambda m, x: m.b(m.a(x)), a=conv2d(), b=nn.Linear(6, 3)),
        IMAGES,
        [("a",), ("b",)],
    ),
    "LayerScale": (
        Reads(lambda m, x: m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=nn.Linear(4, 4), s=LayerScale()),
        IMAGES,
        [("a",)],
    ),
    "LayerScale behind the value": (
        Reads(lambda m, x: m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=nn.Linear(4, 4), s=LayerScale(first=False)),
        IMAGES,
        [("a",)],
    ),
    "LayerScale behind two layers": (
        Reads(
            lambda m, x: m.s(m.b(m.a(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 4), "s": LayerScale()},
        ),
        IMAGES,
        [("a", "b")],
    ),
    "a convolution behind LayerScale": (
        Reads(
            lambda m, x: m.b(m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))),
            **{"a": nn.Linear(4, 4), "s": LayerScale(), "b": conv2d()},
        ),
        IMAGES,
        [("a", "b")],
    ),
    "batch norm behind a permutation": (
        Reads(lambda m, x: m.n(m.a(x).permute(0, 2, 1)), a=nn.Linear(4, 4), n=nn.BatchNorm1d(4)),
        ROWS,
        [("a",)],
    ),
    "another permutation": (
        Reads(lambda m, x: m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 2, 1)), a=nn.Linear(4, 4), s=LayerScale()),
        IMAGES,
        [("a",)],
    ),
    "normalised images": (
        Reads(lambda m, x: m.a((x - m.s.scale) / m.s.scale.exp()), a=conv2d(), s=LayerScale()),
        IMAGES,
        [("a",)],
    ),
    "a scalar scale and shift": (Reads(lambda m, x: m.b(m.a(x * 2 - 1) / 3), a=conv2d(), b=conv2d()), IMAGES, [("a", "b")]),
    "a scale in place": (
        Reads(lambda m, x: m.b(m.a(x).mul_(m.s.scale)), a=conv2d(), b=conv2d(), s=LayerScale()),
        IMAGES,
        [("a", "b")],
    ),
    "transposed convolutions": (
        nn.Sequential(
            nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)
        ),
        IMAGES,
        [("0", "2")],
    ),
    "an upsampling branch": (
        Reads(
            lambda m, x: m.a(x) + m.b(x),
            **{"a": nn.ConvTranspose2d(4, 4, 2, stride=2), "b": nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)},
        ),
        IMAGES,
        [("a", "b")],
    ),
    "padding by name": (
        nn.Sequential(nn.Conv2d(4, 4, (2, 3), padding="same"), nn.Conv2d(4, 4, 2, padding="valid")),
        IMAGES,
        [("0", "1")],
    ),
    "tokens of an image": (
        Reads(lambda m, x: m.b(m.a(x).flatten(2).transpose(1, 2)), a=conv2d(), b=nn.Linear(4, 3)),
        IMAGES,
        [("a", "b")],
    ),
    "pools alone": (nn.Sequential(nn.AvgPool2d(2), nn.AvgPool2d(3)), IMAGES, []),
    "scales alone": (Reads(lambda m, x: (x * 2 + 1) * m.s.scale, s=LayerScale()), IMAGES, []),
    "views alone": (Reads(lambda m, x: x.reshape(8, 36).reshape(2, 4, 36)), IMAGES, []),
}
