"""Prune a network for handwritten digits with a plain PyTorch loop: `python examples/plain_loop.py [CHECKPOINT_DIR]`."""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastentropy as fe

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16
LABELS = torch.tensor(DIGITS.target)
TRAINING, VALIDATION = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0)).split([1300, 497])


class Block(nn.Module):
    """A residual block with a depthwise and a pointwise convolution."""

    def __init__(self, channels: int) -> None:
        """Make a block whose input and output have this number of channels."""
        super().__init__()
        self.depthwise = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels))
        self.pointwise = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on images."""
        return self.relu2(x + self.pointwise(self.relu1(self.depthwise(x))))


def train(model: nn.Module, epochs: int) -> None:
    """Train the model in place with your own training loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in TRAINING[torch.randperm(len(TRAINING))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module) -> Tensor:
    """Return the share of validation images that the model classifies correctly."""
    return (model(IMAGES[VALIDATION]).argmax(1) == LABELS[VALIDATION]).float().mean()


def main(checkpoint_dir: str | None = None, epochs: int = 3, max_removed: int | None = None) -> fe.PruningResult:
    """Train, prune and fuse a network.

    With a checkpoint_dir, a run that was interrupted continues after its last finished step when it is started again.
    The result is the same as without the interruption. The seed gives the same dense network again,
    and the order of the images is drawn from torch's default generator, whose state is stored with each step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(), Block(32), Block(32), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    train(model, 3 * epochs)
    result = fe.prune(
        model,
        train=lambda model: train(model, epochs),
        evaluate=accuracy,
        calibrate=lambda model: model(IMAGES[TRAINING]),
        example_inputs=(IMAGES[:64],),
        max_drop=0.01,
        max_removed=max_removed,
        checkpoint_dir=checkpoint_dir,
    )
    for step in result.steps:
        print(f"accuracy {step.score:.1%} without {', '.join(step.removed) or 'any change'}")
    fused = fe.fuse(result.model, (IMAGES[:64],))
    print(f"removed {', '.join(result.removed)}; fused: {fused.report.speedup:.2f} times as fast as the pruned network")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
