"""The fit of a projection against least squares by `torch.linalg.lstsq`, and the error that it reports."""

import copy

import pytest
import torch
from torch import nn

from fastentropy.fusion import regression
from fastentropy.fusion.projection import project
from tests._helpers.series import NAMES, rms, series, smooth


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
    monkeypatch.setattr(regression, "OBSERVATIONS_PER_NUMBER", 10**6)
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


def test_the_error_covers_all_batches():
    """The first of many batches is of another kind; the fit and its error must cover the others."""
    model = series(norm=False)
    batches = [torch.zeros(8, 4, 9, 9), *(torch.randn(8, 4, 9, 9) for _ in range(30))]
    wanted = [model(batch).detach() for batch in batches[1:]]
    noted = project(model, NAMES, lambda m: [m(batch) for batch in batches])
    left = sum(rms(model(batch) - y) ** 2 for batch, y in zip(batches[1:], wanted, strict=True))
    assert noted.relative_error == pytest.approx((left / sum(rms(y) ** 2 for y in wanted)) ** 0.5, rel=0.15)
