"""Operators that choose, permute or repeat channels or positions are read as selections that compute the same."""

import pytest
import torch
import torch.nn.functional as F

from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.selections import Selection
from tests._helpers.networks import Holder
from tests._helpers.operators import close, normal, pytorch_output
from tests._helpers.reading import read_node

INDEX = torch.tensor([3, 0, 11, 3, 7])

#: Functions of images [2, 12, 4, 6], and the operator of PyTorch that each selection runs as.
SELECTIONS = {
    "a slice": (lambda m, x: x[:, 3:], "slice"),
    "a slice from the end": (lambda m, x: x[:, -5:-1], "slice"),
    "a strided slice": (lambda m, x: x[:, 1::3], "slice"),
    "narrow": (lambda m, x: x.narrow(1, 2, 4), "slice"),
    "one channel that stays an axis": (lambda m, x: x[:, 5:6], "slice"),
    "a chunk": (lambda m, x: x.chunk(3, 1)[1], "slice"),
    "a chunk counted from the last axis": (lambda m, x: x.chunk(5, -3)[-1], "slice"),
    "a split": (lambda m, x: x.split(5, 1)[2], "slice"),
    "a split by sizes": (lambda m, x: x.split([1, 7, 4], dim=1)[1], "slice"),
    "a tensor split": (lambda m, x: x.tensor_split(5, 1)[3], "slice"),
    "a tensor split by indices": (lambda m, x: x.tensor_split((2, 5), 1)[1], "slice"),
    "an index": (lambda m, x: x[:, m.index], "index_select"),
    "an index that is a list": (lambda m, x: x[:, [2, 5, 1]], "index_select"),
    "an index of 32 bits": (lambda m, x: x[:, m.short], "index_select"),
    "index_select": (lambda m, x: x.index_select(1, m.index), "index_select"),
    "a flip": (lambda m, x: x.flip(1), "flip"),
    "a rotation": (lambda m, x: torch.roll(x, 5, 1), "roll"),
    "a rotation back": (lambda m, x: torch.roll(x, -2, 1), "roll"),
    "a channel shuffle": (lambda m, x: F.channel_shuffle(x, 4), "channel_shuffle"),
    "a native channel shuffle": (lambda m, x: torch.native_channel_shuffle(x, 2), "channel_shuffle"),
    "an index that shuffles": (lambda m, x: x[:, m.shuffle], "channel_shuffle"),
    "a repetition": (lambda m, x: x.repeat(1, 2, 1, 1), "index_select"),
    "a repetition of each channel": (lambda m, x: x.repeat_interleave(2, 1), "index_select"),
    "tile": (lambda m, x: x.tile(1, 2, 1, 1), "index_select"),
    "a value behind itself": (lambda m, x: torch.cat([x, x, x], 1), "index_select"),
    "a value behind itself, by name": (lambda m, x: torch.concat([x, x], dim=-3), "index_select"),
    "a pixel shuffle": (lambda m, x: F.pixel_shuffle(x, 2), "pixel_shuffle"),
    "a pixel unshuffle": (lambda m, x: F.pixel_unshuffle(x, 2), "pixel_unshuffle"),
    "nearest": (lambda m, x: F.interpolate(x, scale_factor=2), "upsample_nearest2d"),
    "nearest by different factors": (lambda m, x: F.interpolate(x, scale_factor=(3, 1)), "upsample_nearest2d"),
    "nearest to a size": (lambda m, x: F.interpolate(x, size=(12, 6)), "upsample_nearest2d"),
    "nearest to a recomputed size": (
        lambda m, x: F.interpolate(x, scale_factor=2, recompute_scale_factor=True),
        "upsample_nearest2d",
    ),
    "nearest of rows": (lambda m, x: F.interpolate(x.flatten(2), scale_factor=5), "upsample_nearest1d"),
    "nearest of volumes": (lambda m, x: F.interpolate(x.unflatten(3, (2, 3)), scale_factor=2), "upsample_nearest3d"),
}


def last_node(function):
    model = Holder(function, index=INDEX, short=INDEX.int(), shuffle=torch.arange(12).view(3, 4).T.flatten())
    module = torch.export.export(model, (normal(2, 12, 4, 6, seed=0),)).module(check_guards=False)
    (output,) = module.graph.find_nodes(op="output")
    (node,) = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    return node, module, model


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_read(name):
    function, target = SELECTIONS[name]
    node, module, model = last_node(function)
    read, x = read_node(node, module), normal(2, 12, 4, 6, seed=1)
    operator = read.build(read.axes)
    assert isinstance(operator, Selection)
    assert operator.target.name().split(".")[0] == f"aten::{target}"
    operand = x.reshape(2, 12, *read.operand.meta["val"].shape[2:])
    close(operator(operand), model(x))
    close(pytorch_output(operator, operand), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x[:, ::1],
        lambda m, x: x.repeat(1, 1, 1, 1),
        lambda m, x: x.split(12, 1)[0],
        lambda m, x: F.interpolate(x, scale_factor=1),
        lambda m, x: x[:, list(range(12))],
    ],
)
def test_selections_of_everything_are_read_as_nothing(function):
    node, module, _ = last_node(function)
    assert read_node(node, module).build is None


@pytest.mark.parametrize(
    "function",
    {
        "a slice of the batch": lambda m, x: x[:1],
        "a flip of positions": lambda m, x: x.flip(3),
        "a flip of two axes": lambda m, x: x.flip(1, 2),
        "a rotation of everything": lambda m, x: torch.roll(x, 5),
        "a rotation of positions": lambda m, x: torch.roll(x, 1, 3),
        "an index that is computed": lambda m, x: x[:, (x[0, 0, 0, :3] > 0).long()],
        "two indices": lambda m, x: x[:, m.index, m.index % 4],
        "an index with two axes": lambda m, x: x[:, m.index[None]],
        "a repetition of positions": lambda m, x: x.repeat(1, 1, 2, 1),
        "a new axis": lambda m, x: x.repeat(2, 1, 1, 1, 1),
        "another value": lambda m, x: torch.cat([x, x + 1], 1),
        "a batch behind itself": lambda m, x: torch.cat([x, x]),
        "nearest by a fraction": lambda m, x: F.interpolate(x, scale_factor=1.5),
        "nearest to fewer positions": lambda m, x: F.interpolate(x, scale_factor=0.5),
        "nearest by a factor that is no quotient": lambda m, x: F.interpolate(x, scale_factor=2.1),
        "bilinear": lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_other_choices_are_not_read(function):
    node, module, _ = last_node(function[1])
    assert read_node(node, module) is None


def test_an_index_that_is_overwritten_is_not_read():
    def forward(m, x):
        y = m.a(x)[:, m.index]
        m.index.add_(1)
        return m.b(y)

    layers = {"a": torch.nn.Conv2d(4, 6, 1), "b": torch.nn.Conv2d(3, 2, 1)}
    model = Holder(forward, index=torch.tensor([0, 2, 1]))
    for name, layer in layers.items():
        model.add_module(name, layer)
    module = torch.export.export(model.eval(), (torch.randn(2, 4, 3, 3),)).module(check_guards=False)
    assert [chain.names for chain in find_chains(module)] == [("a",), ("b",)]
