"""Projection against least squares by `torch.linalg.lstsq`, and what it leaves of a model."""

import copy

import pytest
import torch
from torch import nn

from fastentropy.fusion import projection
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.projection import Projection, central_kernel, install, project, replaceable_modules
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.snapshots import assert_unchanged, snapshot

NAMES = ("conv1", "bn1", "relu", "conv2", "bn2")


def series(axes=2, stride=1, groups=1, norm=True, kernel=3):
    """Return two convolutions and what is between them, linearised; the statistics of batch norm are random."""
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    model = nn.Sequential()
    model.conv1 = convolution(4, 8, kernel, stride, kernel // 2, groups=groups, bias=not norm)
    model.bn1 = batch_norm(8) if norm else nn.Identity()
    model.relu = nn.Identity()
    model.conv2 = convolution(8, 6, 3, 1, 1, groups=groups, bias=not norm)
    model.bn2 = batch_norm(6) if norm else nn.Identity()
    for module in model:
        if isinstance(module, batch_norm):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model.eval()


def smooth(*shape):
    """Return random images with similar neighbours, so that a small kernel can approximate a large one."""
    x = torch.randn(shape)
    for axis in range(2, len(shape)):
        x = x + x.roll(1, axis) + x.roll(-1, axis)
    return x


def rms(x):
    return float(x.detach().square().mean().sqrt())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("axes", "stride", "groups", "kernel"),
    [
        (2, 1, 1, 3),
        *(
            pytest.param(*numbers, marks=pytest.mark.slow)
            for numbers in [(1, 1, 1, 3), (2, 2, 1, 3), (2, 1, 2, 5), (3, 1, 1, 3)]
        ),
    ],
)
def test_the_fit_is_the_least_squares_solution(axes, stride, groups, kernel, norm, monkeypatch):
    """The oracle is lstsq over all unfolded patches of the data; the projection fits three quarters of them."""
    monkeypatch.setattr(projection, "OBSERVATIONS_PER_NUMBER", 10**6)
    model = series(axes, stride, groups, norm, kernel)
    x = smooth(96, 4, *(9,) * axes)
    wanted = model(x).detach()
    fitted = copy.deepcopy(model)
    noted = project(fitted, NAMES, lambda m: m(x))
    own = fitted(x).detach()
    left = rms(own - wanted) / rms(wanted)
    assert left == pytest.approx(noted.relative_error, rel=0.1)
    best = rms(best_fit(x, wanted, noted) - wanted) / rms(wanted)
    assert best - 1e-4 <= left <= 1.05 * best + 1e-4
    assert noted.relative_error < noted.centre_error
    assert type(fitted.conv1) is type(model.conv1)
    assert type(fitted.conv2) is nn.Identity
    assert fitted.conv1.kernel_size == (kernel,) * axes


def test_a_sample_of_the_positions_suffices():
    """With six observations per fitted number, the expected error is larger by a factor of (1 + 1/6)^1/2."""
    model = series()
    x = smooth(96, 4, 9, 9)
    wanted = model(x).detach()
    noted = project(model, NAMES, lambda m: m(x))
    assert rms(model(x) - wanted) <= 1.15 * rms(best_fit(x, wanted, noted) - wanted)


def best_fit(x, wanted, noted):
    """Return the outputs of the best convolution with the geometry of a projection."""
    padded = nn.functional.pad(x, [p for size in reversed(noted.padding) for p in (size, size)])
    windows = padded.double()
    for axis, (kernel, stride) in enumerate(zip(noted.kernel, noted.stride, strict=True)):
        windows = windows.unfold(2 + axis, kernel, stride)
    patches = windows.movedim(1, 1 + len(noted.kernel))  # [batch, *positions, channels, *kernel]
    targets = wanted.double().movedim(1, -1).reshape(-1, wanted.shape[1]).chunk(noted.groups, 1)
    rows = patches.reshape(len(targets[0]), noted.groups, -1)
    outputs = []
    for group, target in enumerate(targets):
        u = torch.cat([rows[:, group], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        outputs.append(u @ torch.linalg.lstsq(u, target).solution)
    positions = (wanted.shape[0], *wanted.shape[2:])
    return torch.cat(outputs, 1).reshape(*positions, -1).movedim(-1, 1)


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
    (chain,) = find_chains(inference_module(export(model, (torch.randn(2, 4, 8, 8),))))
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
    (chain,) = find_chains(inference_module(export(model, (torch.randn(2, 4),))))
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
    assert replaceable_modules(model, inference_module(export(model, (torch.randn(2, 1, 6, 6),)))) == {"conv", "norm"}


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


def test_the_error_covers_all_batches():
    """The first of many batches is of another kind; the fit and its error must cover the others."""
    model = series(norm=False)
    batches = [torch.zeros(8, 4, 9, 9), *(torch.randn(8, 4, 9, 9) for _ in range(30))]
    wanted = [model(batch).detach() for batch in batches[1:]]
    noted = project(model, NAMES, lambda m: [m(batch) for batch in batches])
    left = sum(rms(model(batch) - y) ** 2 for batch, y in zip(batches[1:], wanted, strict=True))
    assert noted.relative_error == pytest.approx((left / sum(rms(y) ** 2 for y in wanted)) ** 0.5, rel=0.15)


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
