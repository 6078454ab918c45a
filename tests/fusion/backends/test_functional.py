"""Slices of the outputs of convolutions are no longer overwritten, and the graph computes the same."""

import pytest
import torch
from torch import nn

from fastentropy.fusion.backends.functional import write_new_values, writing_new_values
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.networks import Reads

_aten = torch.ops.aten
part = _aten.slice.Tensor


def overwritten(program):
    """The operators of a program that overwrite a value."""
    return [node.target for node in program.graph.nodes if node.target in (_aten.add_.Tensor, _aten.copy_.default)]


def written(write, shape=(3, 2, 7, 6)):
    """Return how many operators of a model overwrite values before and after, and its outputs before and after.

    The model is a convolution of 2 to 4 channels, and a function of its output and the input that writes to the output.
    """
    convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](2, 4, 3, padding=1)
    model, x = Reads(lambda m, x: write(m.a(x), x), a=convolution).eval(), torch.randn(shape)
    program = torch.export.export(model, (x,), dynamic_shapes=(({0: torch.export.Dim.AUTO},),))
    before = overwritten(program)
    write_new_values(program.graph)
    program.graph.lint()
    program.graph_module.recompile()
    x = torch.randn(5, *shape[1:])
    torch.testing.assert_close(program.module()(x), model(x))
    return len(before), len(overwritten(program))


def adds_to_borders(y, x):
    """Add to the four borders of images. The corners get both."""
    part(y, 2, 0, 1).add_(torch.arange(24.0).view(4, 1, 6))
    part(y, 2, 5, 7).add_(torch.ones(4, 2, 6))
    part(y, 3, 0, 2).add_(torch.full((1, 4, 7, 2), 0.5))
    part(y, 3, 5, 6).add_(2.0 * x[:, :1, :, 0:1])
    return torch.relu(y)


def replaces_borders(y, x):
    """Replace the first row, the last row and a column in the middle of images, one after the other."""
    part(y, 2, 0, 1).copy_(x[:, :, 0:1].repeat(1, 2, 1, 1))
    part(y, 2, 6, 7).copy_(x[:, :, 1:2].repeat(1, 2, 1, 1) + 3)
    part(y, 3, 2, 3).copy_(x.mean(3, keepdim=True).repeat(1, 2, 1, 1))
    return y + 1


def adds_and_replaces(y, x):
    """Add to a row, replace part of it, and add again."""
    part(y, 2, 1, 3).add_(1.0 * x[:, :1, 1:3])
    part(y, 2, 2, 4).copy_(x[:, :, :2].repeat(1, 2, 1, 1))
    part(y, 2, 3, 4).add_(torch.ones(4, 1, 6))
    return y.flatten(1), y


@pytest.mark.parametrize("write", [adds_to_borders, replaces_borders, adds_and_replaces])
def test_new_values_equal_those_that_were_overwritten(write):
    before, after = written(write)
    assert before >= 3
    assert after == 0


@pytest.mark.parametrize("write", [adds_to_borders, None])
def test_network_is_traced_again_only_if_it_overwrites_slices(write):
    model, x = (
        Reads(lambda m, x: write(m.a(x), x) if write else m.a(x), a=nn.Conv2d(2, 4, 3, padding=1)),
        torch.randn(3, 2, 7, 6),
    )
    program = export(model, Inputs((x,), {}))
    network = inference_module(program)
    written = writing_new_values(network, TracedInputs.of(program))
    assert (written is network) == (write is None)
    assert not overwritten(written)
    assert bool(overwritten(network)) == (write is not None)
    x = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(written(x), model(x))


@pytest.mark.parametrize("shape", [(2, 2, 9), (2, 2, 4, 5, 6)])
def test_convolutions_of_any_number_of_axes(shape):
    values = torch.randn(4, 2, *shape[3:])

    def write(y, x):
        part(y, 2, 1, 3).add_(values)
        return y

    assert written(write, shape) == (1, 0)


def reads_before(y, x):
    """Read the whole value before a slice of it is overwritten."""
    z = y * 2
    part(y, 2, 0, 1).add_(torch.ones(4, 1, 6))
    return y + z


def reads_a_view(y, x):
    """Read a view that was made before the value changed."""
    z = y.transpose(2, 3)
    part(y, 2, 0, 1).add_(torch.ones(4, 1, 6))
    return z + 1


def reads_the_slice(y, x):
    """Read the slice itself after it was overwritten."""
    row = part(y, 2, 0, 1)
    row.add_(torch.ones(4, 1, 6))
    return y + row


def repeats_what_it_adds(y, x):
    """Add the same row to two rows."""
    part(y, 2, 0, 2).add_(torch.ones(4, 1, 6))
    return y + 1


def adds_another_dtype(y, x):
    """Add float64 to float32."""
    part(y, 2, 0, 1).add_(torch.ones(4, 1, 6, dtype=torch.float64))
    return y + 1


def changes_what_it_adds(y, x):
    """Change the values after they were added."""
    row = x[:, :1, 0:1] * 2
    part(y, 2, 0, 1).add_(row)
    part(y, 3, 0, 1).add_(torch.ones(4, 7, 1))
    return y + row.mul_(5).sum()


def counts_from_the_end(y, x):
    """Add to the last row."""
    part(y, 2, -1, 2**63 - 1).add_(torch.ones(4, 1, 6))
    return y + 1


def repeats_what_it_copies(y, x):
    """Copy the same row to all channels."""
    part(y, 2, 0, 1).copy_(x[:, :1, 0:1])
    return y + 1


@pytest.mark.parametrize(
    "write",
    [
        reads_before,
        reads_a_view,
        reads_the_slice,
        repeats_what_it_adds,
        repeats_what_it_copies,
        counts_from_the_end,
        adds_another_dtype,
    ],
)
def test_other_values_are_left_as_they_are(write):
    before, after = written(write)
    assert before == after == 1


def test_values_that_change_later_are_left_as_they_are():
    before, after = written(changes_what_it_adds)
    assert before == after == 2
