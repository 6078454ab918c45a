"""Views are read as what they do to the axes of their operand, and operators that select or repeat values are no views."""

import pytest
import torch
import torch.nn.functional as F

from fastentropy.fusion.chains.aten import read_view
from fastentropy.fusion.chains.layouts import natural_layout, view_to
from tests._helpers.networks import Holder
from tests.fusion.chains.test_layouts import computed

VIEWS = {
    "view": lambda x: x.view(2, 3, 20),
    "reshape": lambda x: x.reshape(6, -1),
    "flatten": lambda x: x.flatten(1),
    "flatten the first axes": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "ravel": lambda x: x.ravel(),
    "squeeze": lambda x: x.squeeze(),
    "squeeze an axis": lambda x: x.squeeze(1),
    "squeeze axes": lambda x: x.squeeze((1, 4)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "select the only one": lambda x: x[..., 0],
    "slice everything": lambda x: torch.ops.aten.slice.Tensor(x, 2, 0, 100),
    "narrow to everything": lambda x: x.narrow(3, 0, 5),
    "expand to its shape": lambda x: x.expand(-1, -1, -1, -1, -1),
    "expand as itself": lambda x: x.expand_as(x),
    "view as itself": lambda x: x.view_as(x),
    "permute": lambda x: x.permute(0, 2, 3, 1, 4),
    "transpose": lambda x: x.transpose(-1, 1),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "swapdims": lambda x: x.swapdims(0, 2),
    "movedim": lambda x: x.movedim(1, -1),
    "movedim of several": lambda x: x.movedim((1, 2), (-1, 1)),
    "moveaxis": lambda x: x.moveaxis(1, -2),
    "mT": lambda x: x.mT,
}


def last_read(function, x):
    model = Holder(lambda m, x: function(x))
    graph = torch.export.export(model, (x,)).module(check_guards=False).graph
    (output,) = graph.find_nodes(op="output")
    (node,) = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    return read_view(node)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_moves_the_values_as_its_layout_says(name):
    x = torch.arange(120).reshape(2, 3, 4, 5, 1)
    expected = VIEWS[name](x)
    layout = last_read(VIEWS[name], x)(natural_layout(x.shape))
    assert torch.equal(computed(view_to(layout, x.shape, expected.shape), x), expected)


@pytest.mark.parametrize("function", [lambda x: x.t(), lambda x: x.T])
def test_transposes_of_matrices(function):
    layout = last_read(function, torch.zeros(2, 3))(natural_layout((2, 3)))
    assert layout == natural_layout((2, 3))[::-1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, 0],
        lambda x: x[:, :, ::2],
        lambda x: x.narrow(1, 0, 2),
        lambda x: x.expand(2, 3, 4, 5, 2),
        lambda x: x.flip(1),
        lambda x: x.roll(1, 2),
        lambda x: F.pixel_shuffle(x[..., 0].repeat(1, 4, 1, 1), 2),
        lambda x: x.view(torch.int32),
        lambda x: x.as_strided((2, 3), (1, 1)),
        lambda x: x.relu(),
    ],
)
def test_other_operators_are_no_views(function):
    assert last_read(function, torch.randn(2, 3, 4, 5, 1)) is None
