"""Networks with linear stretches of every kind."""

import torch
from torch import nn

from tests._helpers.networks import Reads


def conv(channels=4, **options):
    return nn.Conv2d(4, channels, 3, padding=1, **options)


X = torch.randn(2, 4, 6, 6)


def two(forward, **modules):
    """A network of two convolutions and what the forward does with them."""
    modules |= {"whole": nn.Conv2d(4, 4, 6), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(), "relu_": nn.ReLU(inplace=True)}
    return Reads(forward, a=conv(), b=conv(), **modules)


class LayerScale(nn.Module):
    """As in torchvision's ConvNeXt: the scale comes first, on channels that were permuted to the front."""

    def __init__(self, first=True):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.first = first

    def forward(self, x):
        return self.scale * x if self.first else x * self.scale


class Conv1D(nn.Module):
    """A linear layer as in GPT-2: addmm on flattened rows."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], len(self.bias))


def reads(forward, **modules):
    return Reads(forward, **modules)


def rows(forward, **constants):
    """Two linear layers, and what the forward does with them."""
    model = reads(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 4), c=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    for name, value in constants.items():
        model.register_buffer(name, value)
    return model


ROWS = torch.randn(2, 3, 4)


#: Networks, an input, and the names of the operators of each chain.
NETWORKS = {
    "GPT-2's MLP": (nn.Sequential(Conv1D(4, 8), Conv1D(8, 4)), ROWS, [("0", "1")]),
    "GPT-2's MLP with an activation": (nn.Sequential(Conv1D(4, 8), nn.GELU(), Conv1D(8, 4)), ROWS, [("0",), ("2",)]),
    "a residual around GPT-2's MLP": (
        reads(lambda m, x: m.b(m.a(x)) + x, a=Conv1D(4, 8), b=Conv1D(8, 4)),
        ROWS,
        [("a", "b")],
    ),
    "matmul with a constant": (rows(lambda m, x: m.a(x) @ m.m, m=torch.randn(5, 3)), ROWS, [("a", "m")]),
    "mm with a constant": (rows(lambda m, x: torch.mm(x, m.m), m=torch.randn(4, 3)), ROWS[0], [("m",)]),
    "rows in another order": (rows(lambda m, x: m.b(m.a(x).transpose(0, 1))), ROWS, [("a",), ("b",)]),
    "another number of features": (rows(lambda m, x: m.c(m.a(x).reshape(6, 5)[:, :4])), ROWS, [("a",), ("c",)]),
    "features that are regrouped": (rows(lambda m, x: m.c(m.c(x).reshape(2, 6, 2).reshape(2, 3, 4))), ROWS, [("c",), ("c",)]),
    "rows that stay flattened": (rows(lambda m, x: m.b(m.a(x.reshape(6, 4)))), ROWS, [("a", "b")]),
    "rows that are regrouped": (rows(lambda m, x: m.b(m.a(x.reshape(6, 4)).reshape(3, 2, 5))), ROWS, [("a", "b")]),
    "rows that are regrouped at last": (rows(lambda m, x: m.b(m.a(x)).reshape(6, 4)), ROWS, [("a", "b")]),
    "rows with a new axis": (rows(lambda m, x: m.b(m.a(x).view(2, 1, 3, 5))), ROWS, [("a", "b")]),
    "a branch that is regrouped": (rows(lambda m, x: m.b(m.a(x)).reshape(6, 4) + x.reshape(6, 4)), ROWS, [("a", "b")]),
    "a branch that comes back": (rows(lambda m, x: m.b(m.a(x.reshape(6, 4))).reshape(2, 3, 4) + x), ROWS, [("a", "b")]),
    "a scale of features": (rows(lambda m, x: m.c(x) * m.v, v=torch.randn(4)), ROWS, [("c",)]),
    "a position embedding": (rows(lambda m, x: m.a(m.c(x) + m.p), p=torch.randn(3, 4)), ROWS, [("c",), ("a",)]),
    "batch norm of rows": (rows(lambda m, x: m.a(m.norm(m.c(x.reshape(6, 4))))), ROWS, [("c", "a")]),
    "a classifier": (
        nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 5), nn.Linear(5, 3)),
        X,
        [("0", "4", "5")],
    ),
    "a classifier of positions": (
        nn.Sequential(conv(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.Dropout(), nn.Linear(5, 3)),
        X,
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
        nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        X,
        [("0", "4")],
    ),
    "batch norm of flattened positions": (
        nn.Sequential(conv(), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 3)),
        X,
        [("0",), ("3",)],
    ),
    "flattened by reshape": (
        reads(lambda m, x: m.b(m.a(x).reshape(x.shape[0], -1)), a=conv(), b=nn.Linear(144, 3)),
        X,
        [("a", "b")],
    ),
    "flattened in part": (reads(lambda m, x: m.b(m.a(x).flatten(2)), a=conv(), b=nn.Linear(36, 3)), X, [("a",), ("b",)]),
    "flattened with the batch": (
        reads(lambda m, x: m.b(m.a(x).flatten(0, 2)), a=conv(), b=nn.Linear(6, 3)),
        X,
        [("a",), ("b",)],
    ),
    "the mean of the positions": (reads(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv(), b=nn.Linear(4, 3)), X, [("a", "b")]),
    "the mean that keeps its axes": (
        reads(lambda m, x: m.b(m.a(x).mean((-2, -1), keepdim=True)), a=conv(), b=nn.Conv2d(4, 3, 1)),
        X,
        [("a", "b")],
    ),
    "the mean of the rows": (
        reads(lambda m, x: m.b(m.a(x).mean(1)), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
        ROWS,
        [("a",), ("b",)],
    ),
    "a linear layer along the last axis": (
        reads(lambda m, x: m.b(m.a(x)), a=conv(), b=nn.Linear(6, 3)),
        X,
        [("a",), ("b",)],
    ),
    "LayerScale": (
        reads(lambda m, x: m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=nn.Linear(4, 4), s=LayerScale()),
        X,
        [("a",)],
    ),
    "LayerScale behind the value": (
        reads(lambda m, x: m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=nn.Linear(4, 4), s=LayerScale(first=False)),
        X,
        [("a",)],
    ),
    "LayerScale behind two layers": (
        reads(
            lambda m, x: m.s(m.b(m.a(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 4), "s": LayerScale()},
        ),
        X,
        [("a", "b")],
    ),
    "a convolution behind LayerScale": (
        reads(
            lambda m, x: m.b(m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))),
            **{"a": nn.Linear(4, 4), "s": LayerScale(), "b": conv()},
        ),
        X,
        [("a",), ("b",)],
    ),
    "batch norm behind a permutation": (
        reads(lambda m, x: m.n(m.a(x).permute(0, 2, 1)), a=nn.Linear(4, 4), n=nn.BatchNorm1d(4)),
        ROWS,
        [("a",)],
    ),
    "another permutation": (
        reads(lambda m, x: m.s(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 2, 1)), a=nn.Linear(4, 4), s=LayerScale()),
        X,
        [("a",)],
    ),
    "normalised images": (
        reads(lambda m, x: m.a((x - m.s.scale) / m.s.scale.exp()), a=conv(), s=LayerScale()),
        X,
        [("a",)],
    ),
    "a scalar scale and shift": (reads(lambda m, x: m.b(m.a(x * 2 - 1) / 3), a=conv(), b=conv()), X, [("a", "b")]),
    "a scale in place": (
        reads(lambda m, x: m.b(m.a(x).mul_(m.s.scale)), a=conv(), b=conv(), s=LayerScale()),
        X,
        [("a", "b")],
    ),
    "transposed convolutions": (
        nn.Sequential(
            nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)
        ),
        X,
        [("0", "2")],
    ),
    "an upsampling branch": (
        reads(
            lambda m, x: m.a(x) + m.b(x),
            **{"a": nn.ConvTranspose2d(4, 4, 2, stride=2), "b": nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)},
        ),
        X,
        [("a", "b")],
    ),
    "padding by name": (
        nn.Sequential(nn.Conv2d(4, 4, (2, 3), padding="same"), nn.Conv2d(4, 4, 2, padding="valid")),
        X,
        [("0", "1")],
    ),
    "pools alone": (nn.Sequential(nn.AvgPool2d(2), nn.AvgPool2d(3)), X, []),
    "scales alone": (reads(lambda m, x: (x * 2 + 1) * m.s.scale, s=LayerScale()), X, []),
    "views alone": (reads(lambda m, x: x.reshape(8, 36).reshape(2, 4, 36)), X, []),
}
