"""Fused models are differentiated and trained."""

import pytest
import torch
import torch.nn.functional as F

from fastentropy import fuse, load
from tests._helpers.fusing import ringed

pytestmark = pytest.mark.usefixtures("counted_times")


def test_gradients_after_fusing_in_inference_mode(network, images):
    with torch.inference_mode():
        fused = fuse(network.eval(), (images,))
    x = images.clone().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None


@pytest.mark.slow
def test_trainable_borders_differ_and_the_rest_does_not(merged):
    model, x = ringed()
    fused = fuse(model, (x,), borders="train")
    with torch.no_grad():
        actual, expected = fused(x), model(x)
    torch.testing.assert_close(actual[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert fused.report.max_relative_error > 1e-3
    assert "differs at the border" in fused.report.chains[0].note
    first, second = model[0], model[1]
    with torch.no_grad():
        moved = F.conv2d(F.conv2d(x, first.weight, first.bias, padding=2), second.weight, second.bias).relu()
    torch.testing.assert_close(actual, moved, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_borders_are_trained_and_saved(merged, tmp_path):
    model, x = ringed()
    fused = fuse(model, (x,), borders="train")
    target = model(x).detach()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(fused(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    fused.save(tmp_path / "model.pt2")
    torch.testing.assert_close(load(tmp_path / "model.pt2")(x), fused(x))
