"""Inputs of other sizes, numbers and kinds than the example: which a fused model takes, and which it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import fuse, load
from tests._helpers.fusing import assert_equal, inverted_residual, ringed, two_layers
from tests._helpers.networks import Reads

pytestmark = pytest.mark.usefixtures("counted_times")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)), (16,)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 5, 3)), (1, 6, 6)),
        (nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2)), (1, 4, 4)),
    ],
)
def test_inputs_without_a_batch(model, shape):
    x = torch.randn(shape)
    assert_equal(fuse(model.eval(), (x,)), model, x)


def test_refused_batch_sizes_are_not_tried():
    model = Reads(lambda m, x: m.b(m.a(x.view(-1, 4, 3).mean(1))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    fused = fuse(model.eval(), (torch.randn(8, 3),))
    assert_equal(fused, model, torch.randn(8, 3))


def test_other_sizes_are_refused():
    model = Reads(lambda m, x: m.b(m.a(x)) * (2 if x.shape[-1] > 16 else 1), a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 1))
    fused = fuse(model.eval(), (torch.randn(2, 2, 32, 32),))
    with pytest.raises(ValueError, match=r"has shape \[2, 2, 8, 8\], but this model was fused for \['any', 2, 32, 32\]"):
        fused(torch.randn(2, 2, 8, 8))


@pytest.mark.parametrize(
    ("forward", "example", "other"),
    [
        (lambda m, x, k: m.b(m.a(x)) * k, 2.0, 3.0),
        (lambda m, x, flip: -m.b(m.a(x)) if flip else m.b(m.a(x)), False, True),
        (lambda m, x, mask: m.b(m.a(x)) if mask is None else m.b(m.a(x)) * mask, None, torch.ones(8)),
        (lambda m, x, k: m.b(m.a(x)) * k, torch.ones(8), 2.0),
    ],
)
def test_other_constants_are_refused_after_loading_too(forward, example, other, tmp_path):
    model, x = two_layers(forward), torch.randn(2, 8)
    fused = fuse(model, (x, example))
    assert_equal(fused, model, x, example)
    fused.save(tmp_path / "model.pt2")
    for each in (fused, load(tmp_path / "model.pt2")):
        with pytest.raises(ValueError, match="fuse it again"):
            each(x, other)


@pytest.mark.parametrize(
    ("forward", "dynamic", "other"),
    [
        (lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] % 4 == 0 else 1), False, (4, 6, 8)),
        (lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] > 1 else 1), False, (1, 6, 8)),
        pytest.param(
            lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] == x.shape[1] else 1), True, (5, 5, 8), marks=pytest.mark.slow
        ),
        pytest.param(lambda m, x: m.b(m.a(x)) * (2 if x.shape[1] > 1 else 1), True, (3, 1, 8), marks=pytest.mark.slow),
        (lambda m, x: m.b(m.a(x)) if x.shape[0] > 1 else m.b(m.a(x))[0], False, (1, 6, 8)),
        (lambda m, x: m.b(m.a(x)).argmax(-1) * (-1 if x.shape[0] == 1 else 1), False, (1, 6, 8)),
    ],
)
def test_sizes_of_another_branch_are_refused(forward, dynamic, other, tmp_path):
    model, x = two_layers(forward), torch.randn(3, 6, 8)
    fused = fuse(model, (x,), dynamic_sizes=dynamic)
    fused.save(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(fused(x), model(x)) or (fused(x) - model(x)).abs().max() < 1e-5
    for each in (fused, load(tmp_path / "model.pt2")):
        with pytest.raises(ValueError, match="fuse it again"):
            each(torch.randn(other))


@pytest.mark.parametrize("count", [0, 2])
def test_other_number_of_inputs_is_refused(network, images, count):
    fused = fuse(network.eval(), (images,))
    with pytest.raises(ValueError, match=f"fused for 1 input, but is called with {count}"):
        fused(*[images] * count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "forward", "shape", "sizes"),
    [
        (nn.Conv2d, lambda m, x: m.b(m.a(x / 255.0 - 0.5)), (2, 4, 19, 19), (20, 23)),
        # PyTorch 2.11 traces pooling for odd sizes alone if the example is odd.
        (nn.Conv2d, lambda m, x: m.b(m.a(F.avg_pool2d(x, 2))), (2, 4, 19, 19), (21 if torch.__version__ < (2, 12) else 20, 23)),
        (nn.Linear, lambda m, x: m.b(m.a(x * 2.0)), (2, 7, 4), (20, 23)),
    ],
)
def test_free_sizes_behind_a_scale(layer, forward, shape, sizes):
    options = (4, 4, 3) if layer is nn.Conv2d else (4, 4)
    model = Reads(forward, a=layer(*options), b=layer(*options)).eval()
    fused = fuse(model, (torch.randn(shape),), dynamic_sizes=True)
    for size in sizes:
        assert_equal(fused, model, torch.randn([size if n > 6 else n for n in shape]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [9, 10, 11, 12, 15])
def test_border_that_only_some_sizes_have(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 2, padding="same"), nn.Conv1d(4, 4, 1, stride=3)).eval()
    fused = fuse(model, (torch.randn(2, 4, 10),), dynamic_sizes=True)
    assert_equal(fused, model, torch.randn(2, 4, size))


def test_several_and_nested_inputs():
    model = Reads(lambda m, x, pair: m.b(m.a(x)) + pair["bias"], a=nn.Linear(3, 4), b=nn.Linear(4, 5))
    inputs = (torch.randn(2, 3), {"bias": torch.randn(2, 5)})
    assert_equal(fuse(model.eval(), inputs), model, torch.randn(4, 3), {"bias": torch.randn(4, 5)})


@pytest.mark.parametrize("others", [(None,), (3,), (2.5, False), (torch.tensor(2.0),), (None, "negated")])
def test_inputs_that_are_not_tensors(others, tmp_path):
    def forward(m, x, factor, sign=True):
        y = m.b(m.a(x)) if factor is None else m.b(m.a(x)) * factor
        return y if sign is True else -y

    model = Reads(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).eval()
    fused = fuse(model, (torch.randn(2, 3), *others))
    assert fused.report.choice == "fused"
    assert_equal(fused, model, torch.randn(5, 3), *others)
    fused.save(tmp_path / "model.pt2")
    assert_equal(load(tmp_path / "model.pt2"), model, torch.randn(5, 3), *others)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(9, 9), (2, 5), (30, 17)])
def test_images_of_other_sizes(height, width):
    model, x = inverted_residual()
    fused = fuse(model, (x,), dynamic_sizes=True)
    assert fused.report.chains[0].choice == "merge"
    for batch in (1, 2, 4):
        assert_equal(fused, model, torch.randn(batch, 3, height, width))


@pytest.mark.slow
def test_sequences_of_other_lengths(tmp_path):
    model = nn.Sequential(nn.Linear(4, 16), nn.Identity(), nn.Linear(16, 4), nn.ReLU()).eval()
    fused = fuse(model, (torch.randn(2, 7, 4),), dynamic_sizes=True)
    assert fused.report.chains[0].choice == "merge"
    assert_equal(fused, model, torch.randn(3, 19, 4))
    fused.save(tmp_path / "model.pt2")
    assert_equal(load(tmp_path / "model.pt2"), model, torch.randn(3, 5, 4))


@pytest.mark.slow
def test_border_at_an_unknown_place_is_kept():
    model, x = ringed()
    fused = fuse(model, (x,), dynamic_sizes=True)
    assert fused.report.chains[0].choice == "keep"
    assert "depends on the size" in fused.report.chains[0].note
    assert_equal(fused, model, torch.randn(2, 2, 5, 30))
