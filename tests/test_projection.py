import copy

import pytest
import torch
from torch import nn

from conftest import assert_unchanged, snapshot
from fastentropy.fusion.chains import find_chains
from fastentropy.fusion.projection import Projection, can_project, centre, place, project
from fastentropy.fusion.tracing import export, inference_module

NAMES = ("conv1", "bn1", "relu", "conv2", "bn2")


def series(axes=2, stride=1, groups=1, norm=True, kernel=3):
    """Two convolutions and what is between them, linearised; statistics are odd."""
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
    """Images whose neighbours resemble each other, so that a small kernel can stand for a large one."""
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
    ("axes", "stride", "groups", "kernel"), [(1, 1, 1, 3), (2, 1, 1, 3), (2, 2, 1, 3), (2, 1, 2, 5), (3, 1, 1, 3)]
)
def test_the_fit_is_the_least_squares_solution(axes, stride, groups, kernel, norm):
    """The oracle: numpy's lstsq over the unfolded patches, at every position of the data."""
    model = series(axes, stride, groups, norm, kernel)
    x = smooth(24, 4, *(9,) * axes)
    wanted = model(x).detach()
    fitted = copy.deepcopy(model)
    projection = project(fitted, NAMES, lambda m: m(x))
    own = fitted(x).detach()
    left = rms(own - wanted) / rms(wanted)
    assert left == pytest.approx(projection.relative_error, rel=0.1)
    best = rms(best_fit(x, wanted, projection) - wanted) / rms(wanted)
    assert best - 1e-4 <= left <= 1.05 * best + 1e-4
    assert projection.relative_error <= projection.centre_error + 1e-9
    assert type(fitted.conv1) is type(model.conv1)
    assert type(fitted.conv2) is nn.Identity
    assert fitted.conv1.kernel_size == (kernel,) * axes


def best_fit(x, wanted, projection):
    """The outputs of the best convolution of the projection's geometry."""
    padded = nn.functional.pad(x, [p for size in reversed(projection.padding) for p in (size, size)])
    windows = padded.double()
    for axis, (kernel, stride) in enumerate(zip(projection.kernel, projection.stride, strict=True)):
        windows = windows.unfold(2 + axis, kernel, stride)
    patches = windows.movedim(1, 1 + len(projection.kernel))  # [batch, *positions, channels, *kernel]
    targets = wanted.double().movedim(1, -1).reshape(-1, wanted.shape[1]).chunk(projection.groups, 1)
    rows = patches.reshape(len(targets[0]), projection.groups, -1)
    outputs = []
    for group, target in enumerate(targets):
        u = torch.cat([rows[:, group], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        outputs.append(u @ torch.linalg.lstsq(u, target).solution)
    positions = (wanted.shape[0], *wanted.shape[2:])
    return torch.cat(outputs, 1).reshape(*positions, -1).movedim(-1, 1)


def test_what_a_smaller_kernel_can_be_is_found_exactly():
    """Taps beyond the centre that are zero: nothing is lost but at the border."""
    model = series(norm=False)
    with torch.no_grad():
        model.conv2.weight[..., [0, 2], :] = 0
        model.conv2.weight[..., [0, 2]] = 0
    x = torch.randn(16, 4, 8, 8)
    wanted = model(x).detach()
    projection = project(model, NAMES, lambda m: m(x))
    assert projection.relative_error < 1e-5
    assert projection.centre_error < 1e-5
    torch.testing.assert_close(model(x), wanted)


def test_in_training_mode_the_new_batch_norm_normalises_to_the_same_outputs():
    model = series()
    x = smooth(64, 4, 9, 9)
    project(model, NAMES, lambda m: m(x))
    in_eval = model(x).detach()
    assert rms(model.train()(x) - in_eval) < 0.05 * rms(in_eval)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_data_in_some_direction_the_centre_of_the_exact_kernel_stays():
    """Constant images say nothing of how a kernel's taps share its sum."""
    model = series(norm=False)
    exact = centre_of(model)
    project(model, NAMES, lambda m: m(torch.zeros(4, 4, 8, 8)))
    torch.testing.assert_close(model.conv1.weight.detach().double(), exact.weight, rtol=1e-4, atol=1e-5)


def centre_of(model):
    (chain,) = find_chains(inference_module(export(model, (torch.randn(2, 4, 8, 8),))))
    return centre(chain.elements)


def test_the_structure_comes_back_from_what_was_noted():
    model = series(stride=2)
    other = copy.deepcopy(model)
    x = smooth(8, 4, 9, 9)
    projection = project(model, NAMES, lambda m: m(x))
    place(other, projection)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_chain_whose_operator_is_no_larger_has_no_centre(kernel):
    model = nn.Sequential(nn.Conv2d(4, 4, kernel, padding=kernel // 2), nn.Conv2d(4, 4, 1)).eval()
    with pytest.raises(ValueError, match="no smaller convolution"):
        centre_of(model)


def test_a_stretch_of_linear_layers_has_no_centre():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)).eval()
    (chain,) = find_chains(inference_module(export(model, (torch.randn(2, 4),))))
    with pytest.raises(ValueError, match="only a series of convolutions"):
        centre(chain.elements)


def test_only_plain_convolutions_and_batch_norms_are_replaced():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), Own(1, 1, 3), nn.ConvTranspose2d(1, 1, 3))
    assert can_project(model, ["0", "1"])
    assert not can_project(model, ["0", "2"])
    assert not can_project(model, ["0", "3"])


def test_a_calibration_without_a_pass_leaves_the_model_as_it_was():
    model = series()
    before = snapshot(model)
    with pytest.raises(ValueError, match="calibrate made no forward pass"):
        project(model, NAMES, lambda m: None)
    assert_unchanged(model, before)


def test_a_calibration_that_raises_leaves_the_model_as_it_was():
    model = series()
    before = snapshot(model)

    def calibrate(m):
        m(smooth(2, 4, 9, 9))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        project(model, NAMES, calibrate)
    assert_unchanged(model, before)


def test_a_projection_comes_back_from_json():
    projection = Projection(("a", "b"), 4, 6, (3, 3), (1, 1), (1, 1), 1, 0.25, 0.5)
    values = {**vars(projection), "modules": ["a", "b"], "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    assert Projection.from_dict(values) == projection
    with pytest.raises(TypeError):
        Projection.from_dict({"modules": []})
