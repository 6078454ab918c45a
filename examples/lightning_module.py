"""Prune a network that Lightning trains: `python examples/lightning_module.py [CHECKPOINT_DIR]`."""

import logging
import sys

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastentropy as fe

IMAGES, LABELS = (torch.tensor(values) for values in load_digits(return_X_y=True))
IMAGES = IMAGES.float() / 16
TRAINING, VALIDATION = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0)).split([1300, 497])
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(L.LightningModule):
    """Train the network that is passed, in place. `prune` passes its own copy."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap a network for one call of `fit`."""
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of one batch."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return a new optimizer for each call of `fit`."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(network: nn.Module, epochs: int) -> None:
    """Train the network in place. Afterwards it is on the CPU, whatever the accelerator was."""
    loader = DataLoader(TensorDataset(IMAGES[TRAINING], LABELS[TRAINING]), batch_size=64, shuffle=True)
    L.Trainer(max_epochs=epochs, accelerator="cpu", **QUIET).fit(Classifier(network), loader)


def accuracy(network: nn.Module) -> Tensor:
    """Return the share of validation images that the network classifies correctly."""
    return (network(IMAGES[VALIDATION]).argmax(1) == LABELS[VALIDATION]).float().mean()


def main(checkpoint_dir: str | None = None, epochs: int = 4, max_removed: int | None = None) -> fe.PruningResult:
    """Train, prune and fuse a network.

    With a checkpoint_dir, a run that was interrupted continues after its last finished step when it is started again.
    The result is the same as without the interruption. `fit` seeds nothing, and the
    state of torch's default generator is stored with each step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    relu = nn.ReLU()
    hidden = (nn.Linear(64, 256), relu, nn.Linear(256, 256), relu, nn.Linear(256, 256), relu)
    # One ReLU is called in three places, so it cannot be removed from one place alone. isolate gives each place its own ReLU.
    network = fe.isolate(nn.Sequential(*hidden, nn.Linear(256, 10)), (IMAGES[:64],))
    train(network, 3 * epochs)
    result = fe.prune(
        network,
        train=lambda network: train(network, epochs),
        evaluate=accuracy,
        calibrate=lambda network: network(IMAGES[TRAINING]),
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
