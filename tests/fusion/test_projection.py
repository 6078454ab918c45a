"""What a projection leaves of a model, which modules it may replace, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.projection import Projection, central_kernel, install, project, replaceable_modules
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.series import NAMES, rms, series, smooth
from tests._helpers.snapshots import assert_unchanged, snapshot


def test_an_exact_smaller_kernel_is_found():
    """If the taps beyond the centre are zero, the smaller kernel is exact."""
    model = series(norm=False)
    with torch.no_grad():
        model.conv2.weight[..., [0, 2], :] = 0
        model.conv2.weight[..., [0, 2]] = 0
    x = torch.randn(16, 4, 8, 8)
    wanted = model(x).detach()
    noted = project(model, NAMES, lambda m: m(x))
    assert noted.relative_error < 1e-5
    assert noted.centre_error < 1e-5
    torch.testing.assert_close(model(x), wanted)


def test_the_new_batch_norm_gives_the_same_outputs_in_training():
    model = series()
    x = smooth(64, 4, 9, 9)
    project(model, NAMES, lambda m: m(x))
    in_eval = model(x).detach()
    assert rms(model.train()(x) - in_eval) < 0.05 * rms(in_eval)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_centre_stays_where_the_data_say_nothing():
    """Images of zeros say nothing about the weight."""
    model = series(norm=False)
    exact = centre_of(model)
    project(model, NAMES, lambda m: m(torch.zeros(4, 4, 8, 8)))
    torch.testing.assert_close(model.conv1.weight.detach().double(), exact.weight, rtol=1e-4, atol=1e-5)


def centre_of(model):
    (chain,) = find_chains(inference_module(export(model, Inputs((torch.randn(2, 4, 8, 8),)))))
    return central_kernel(chain.elements)


def test_a_projection_restores_the_structure():
    model = series(stride=2)
    other = copy.deepcopy(model)
    x = smooth(8, 4, 9, 9)
    noted = project(model, NAMES, lambda m: m(x))
    install(other, noted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("second", [nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 3, dilation=2)])
def test_some_convolutions_have_no_centre(second):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), second).eval()
    with pytest.raises(ValueError, match="no smaller convolution"):
        centre_of(model)


def test_linear_layers_have_no_centre():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)).eval()
    (chain,) = find_chains(inference_module(export(model, Inputs((torch.randn(2, 4),)))))
    with pytest.raises(ValueError, match="only a series of convolutions"):
        central_kernel(chain.elements)


class OwnConvolution(nn.Conv2d):
    """A subclass, whose forward might be another."""


class Mixed(nn.Module):
    """`conv` and `norm` may be replaced, the other modules may not."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.own, self.transposed = OwnConvolution(1, 1, 3, padding=1), nn.ConvTranspose2d(1, 1, 3, padding=1)
        self.reflecting = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        self.twice, self.watched = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.shared = self.again = nn.Conv2d(1, 1, 3, padding=1)
        self.watched.register_forward_hook(lambda module, inputs, output: None)

    def forward(self, x):
        x = self.transposed(self.own(self.norm(self.conv(x))))
        return self.again(self.watched(self.twice(self.twice(self.reflecting(x)))))


def test_only_plain_modules_called_once_are_replaceable():
    model = Mixed().eval()
    assert replaceable_modules(model, inference_module(export(model, Inputs((torch.randn(2, 1, 6, 6),))))) == {"conv", "norm"}


def test_a_stretch_that_is_no_larger_becomes_exact():
    """Once two of three convolutions are one, a 3×3 and a 1×1 convolution can be left, which are a 3×3 one."""
    identities = (nn.Identity() for _ in range(3))
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), *identities, nn.Conv2d(8, 5, 1)).eval()
    x = torch.randn(8, 4, 7, 7)
    wanted = model(x).detach()
    noted = project(model, tuple("01234"), lambda m: m(x))
    assert noted.relative_error < 1e-6
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_options_of_modules_are_kept():
    model = series()
    model.bn1.eps, model.bn1.momentum = 0.01, 0.3
    model.requires_grad_(False)
    x = smooth(16, 4, 9, 9)
    project(model, NAMES, lambda m: m(x))
    assert (model.bn1.eps, model.bn1.momentum) == (0.01, 0.3)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_calibration_without_a_pass_changes_nothing():
    model = series()
    before = snapshot(model)
    with pytest.raises(ValueError, match="calibrate made no forward pass"):
        project(model, NAMES, lambda m: None)
    assert_unchanged(model, before)


def test_a_calibration_that_raises_changes_nothing():
    model = series()
    before = snapshot(model)

    def calibrate(m):
        m(smooth(2, 4, 9, 9))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        project(model, NAMES, calibrate)
    assert_unchanged(model, before)


def test_a_projection_survives_json():
    projection = Projection(("a", "b"), 4, 6, (3, 3), (1, 1), (1, 1), 1, 0.25, 0.5)
    values = {**vars(projection), "modules": ["a", "b"], "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    assert Projection.from_dict(values) == projection
    with pytest.raises(TypeError):
        Projection.from_dict({"modules": []})
