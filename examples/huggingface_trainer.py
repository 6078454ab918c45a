"""Prune a Vision Transformer with Hugging Face's Trainer: `python examples/huggingface_trainer.py [CHECKPOINT_DIR]`."""

import sys
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fastentropy as fe

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 8 - 1
LABELS = torch.tensor(DIGITS.target)
TRAINING, VALIDATION = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0)).split([1300, 497])
IMAGE_SIZES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


def train(model: nn.Module, epochs: int) -> None:
    """Train the model in place with a new Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=4e-3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        dataset = [{"pixel_values": IMAGES[index], "labels": LABELS[index]} for index in TRAINING]
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def accuracy(model: nn.Module) -> Tensor:
    """Return the share of validation images that the model classifies correctly."""
    return (model(IMAGES[VALIDATION]).logits.argmax(1) == LABELS[VALIDATION]).float().mean()


def main(checkpoint_dir: str | None = None, epochs: int = 2, max_removed: int | None = None) -> fe.PruningResult:
    """Train, prune and fuse a network.

    With a checkpoint_dir, a run that was interrupted continues after its last finished step when it is started again.
    The result is the same as without the interruption. Each Trainer seeds all random generators
    with `args.seed`, so earlier random numbers do not matter.
    """
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**IMAGE_SIZES, **SIZES, initializer_range=0.1))
    # isolate is needed only for activations that are functions or share a module. A ViT has neither.
    model = fe.isolate(model, (IMAGES[:64],))
    train(model, 2 * epochs)
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
