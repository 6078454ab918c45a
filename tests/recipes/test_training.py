"""What recipes share to train a network: crops, schedules and losses."""

import pytest
import torch
import torch.nn.functional as F

from fastentropy.recipes.training import Schedule, classification_loss, draw_crops, random_crops

CPU = torch.device("cpu")


def test_crops_of_the_whole_image_are_the_image():
    images = torch.randint(256, (4, 3, 9, 9), dtype=torch.uint8)
    whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3)
    torch.testing.assert_close(random_crops(images, whole), images.float(), atol=1e-3, rtol=0)
    mirrored = whole * torch.tensor([[-1.0], [1]])
    torch.testing.assert_close(random_crops(images, mirrored), images.float().flip(3), atol=1e-3, rtol=0)


def test_crops_lie_in_the_image():
    crops = draw_crops(1000, CPU)
    sizes, centres = torch.stack([crops[:, 0, 0].abs(), crops[:, 1, 1]]), crops[:, :, 2].T
    assert ((centres.abs() + sizes) <= 1 + 1e-6).all()
    assert 0.4 < (crops[:, 0, 0] < 0).double().mean() < 0.6
    assert sizes.prod(0).min() > 0.4
    assert sizes.prod(0).max() > 0.9


def test_epochs_go_through_all_images():
    schedule = Schedule(available=50, images_per_epoch=20, batch_size=8, epochs=6)
    order = schedule.draw_order()
    assert len(order) == schedule.steps == 12
    assert {len(batch) for batch in order} == {8}
    seen = torch.cat(order)
    assert sorted(seen[:50].tolist()) == list(range(50))
    assert len(set(seen[50:].tolist())) == 46


@pytest.mark.parametrize(("epochs", "per_epoch"), [(1, 8), (1, 80), (7, 80)])
def test_learning_rate_rises_and_falls(epochs, per_epoch):
    schedule = Schedule(100, per_epoch, 8, epochs)
    rates = [schedule.share_of_rate(step) for step in range(schedule.steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert max(rates) <= 1


def test_distillation_loss():
    logits, taught = torch.randn(2, 5, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    ordinary = F.cross_entropy(logits.float(), labels)
    assert classification_loss(logits, labels, 0.0) == ordinary
    softened, target = ((each / 3).softmax(1) for each in (logits, taught))
    divergence = (target * (target / softened).log()).sum(1).mean()
    expected = 0.5 * ordinary.double() + 0.5 * 9 * divergence
    torch.testing.assert_close(classification_loss(logits, labels, 0.0, taught, 3.0).double(), expected, rtol=1e-5, atol=1e-6)


def test_label_smoothing():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    logs = logits.log_softmax(1)
    expected = -(0.7 * logs[torch.arange(5), labels] + 0.3 * logs.mean(1)).mean()
    torch.testing.assert_close(classification_loss(logits, labels, 0.3), expected)
