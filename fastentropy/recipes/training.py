"""What recipes share to train a network: the schedule, random crops, the loss, and compiled networks."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The share of a schedule in which the learning rate rises. It is at most one epoch.
WARM_UP = 0.1
#: The smallest part of an image that a random crop keeps, and the largest ratio of its width to its height.
SMALLEST_CROP, WIDEST_CROP = 0.5, 4 / 3
#: The running statistics of batch norm forget within this share of a schedule, also with a momentum for longer schedules.
MEMORY = 0.2


class Schedule:
    """Which images a training sees in which order, and how its learning rate changes.

    All batches have the same size, because batch norm would take a mean of few images from a smaller one.

    Attributes:
        batch_size: the number of images in a batch.
        steps: the number of batches.
        images: the number of images in all batches.
    """

    def __init__(self, available: int, images_per_epoch: int, batch_size: int, epochs: int) -> None:
        """Plan a training.

        Args:
            available: the number of training images.
            images_per_epoch: how many of them an epoch takes, at most all.
            batch_size: the number of images in a batch, if an epoch has so many.
            epochs: the number of epochs.
        """
        self.batch_size = min(batch_size, images_per_epoch)
        self._steps_per_epoch = images_per_epoch // self.batch_size
        self.steps = epochs * self._steps_per_epoch
        self.images = self.steps * self.batch_size
        self._available = available

    def draw_order(self) -> list[Tensor]:
        """Draw the images of each batch, as int64 [batch_size] on the CPU.

        No image comes again before all others have had their turn.
        """
        rounds = -(-self.images // self._available)
        order = torch.cat([torch.randperm(self._available, device="cpu") for _ in range(rounds)])
        return list(order[: self.images].split(self.batch_size))

    def share_of_rate(self, step: int) -> float:
        """Return by what the highest learning rate is multiplied in a step: a linear warm-up, then half a cosine down to 0."""
        warm_up = max(1, min(round(WARM_UP * self.steps), self._steps_per_epoch))
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up))

    @contextlib.contextmanager
    def batch_norm_momentum(self, model: nn.Module) -> Iterator[None]:
        """Let the running statistics of batch norm follow a short training within the `with` block.

        A network made for long training may have a momentum of 0.01. After the 100 steps of a fine-tuning, more than a third of
        its running statistics would be those of the network before.
        """
        least = min(0.1, 1 / (MEMORY * self.steps))
        kept = {
            module: module.momentum
            for module in model.modules()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.momentum is not None
        }
        for module, momentum in kept.items():
            module.momentum = max(momentum, least)
        try:
            yield
        finally:
            for module, momentum in kept.items():
                module.momentum = momentum


def draw_crops(count: int, device: torch.device) -> Tensor:
    """Draw random crops: a part of the image, and whether it is mirrored from left to right.

    The CPU draws the numbers, because its generator gives the same ones on every machine.

    Args:
        count: the number of images.
        device: where the result is placed.

    Returns:
        float32 [count, 2, 3], the affine maps from positions in the crop to positions in the image, as in `F.affine_grid`.
    """
    area, ratio, left, top, mirrored = torch.rand(5, count, dtype=torch.float32, device="cpu")
    area = SMALLEST_CROP + (1 - SMALLEST_CROP) * area
    ratio = torch.exp((2 * ratio - 1) * math.log(WIDEST_CROP))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    zeros, sign = torch.zeros_like(width), torch.where(mirrored < 0.5, 1.0, -1.0)
    rows = [
        torch.stack([sign * width, zeros, (1 - width) * (2 * left - 1)], 1),
        torch.stack([zeros, height, (1 - height) * (2 * top - 1)], 1),
    ]
    return torch.stack(rows, 1).to(device)


def random_crops(images: Tensor, crops: Tensor) -> Tensor:
    """Cut parts out of images, and resize each to the size of the images by bilinear interpolation.

    Args:
        images: uint8 [batch, 3, height, width].
        crops: from `draw_crops`.

    Returns:
        float32 [batch, 3, height, width], from 0 to 255.
    """
    grid = F.affine_grid(crops, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def classification_loss(
    logits: Tensor, labels: Tensor, smoothing: float, taught: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the mean cross-entropy of logits. With a teacher, it is half of the loss, and distillation is the other half.

    Args:
        logits: [batch, classes].
        labels: int64 [batch].
        smoothing: the label smoothing (arXiv 1512.00567), from 0 to 1.
        taught: the logits of the teacher, [batch, classes], or None.
        temperature: by which both logits are divided for the distillation (arXiv 1503.02531, section 2).

    Returns:
        The loss, a scalar.
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    if taught is None:
        return loss
    own, others = ((each.float() / temperature).log_softmax(1) for each in (logits, taught))
    return 0.5 * loss + 0.5 * temperature**2 * F.kl_div(own, others, reduction="batchmean", log_target=True)


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the compiled forward of a model.

    It is compiled once for each size of the batch, because `dynamic` is False.
    """
    # The model is compiled anew after every removal of an activation. torch.compile gives up after eight compilations of the
    # same code, so the earlier ones are cleared.
    torch.compiler.reset()
    # A lambda is compiled, because torch.compile(model) would add attributes to the model.
    return torch.compile(lambda images: model(images), dynamic=False)
