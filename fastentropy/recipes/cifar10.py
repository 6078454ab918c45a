"""The recipe `cifar10`: CIFAR-10 and the networks of EASIER (arXiv 2404.18949), trained by the schedule of the paper."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastentropy.recipes import Progress, Recipe, Report, Split, ignore
from fastentropy.recipes.cifar10_data import CLASSES, PADDING, augment, data_folder, read_images
from fastentropy.recipes.cifar10_models import MODELS
from fastentropy.recipes.image_files import hold_out
from fastentropy.recipes.training import compiled

BATCH_SIZE = 128
#: The initial learning rate of a network by its name. It is 0.1 for the networks that are not listed.
LEARNING_RATES = {"vgg16_bn": 0.01, "swin_t": 0.001}
#: Mean and standard deviation of the training pixels, for red, green and blue. Pixels range from 0 to 255.
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)


class Cifar10(Recipe):
    """The recipe `cifar10`. It holds out 10 % of the training images for validation, and tests on the test images.

    Images and weights are in the channels-last memory format, because most of the networks run faster in it, also on a CPU.
    All images are kept on the device as uint8. On a GPU the networks run under autocast to bfloat16, and training synchronises
    with the GPU only once per epoch. On a CPU the networks run in float32.
    """

    epochs = 160

    def __init__(
        self,
        device: torch.device,
        *,
        model: str = "resnet18",
        data: str | None = None,
        width: float = 1.0,
        compile: bool = False,
    ) -> None:
        """Read all images, split them, and place them on a device.

        Args:
            device: where the images and the networks are placed.
            model: a name in `MODELS`.
            data: a folder with the parquet files of the data set `uoft-cs/cifar10` of the Hugging Face Hub, or "cifar10" to
                download them. It must be given.
            width: by which the channels of all layers are multiplied.
            compile: whether the network is compiled with torch.compile for training.

        Raises:
            ValueError: the model is unknown, or the data is missing or damaged.
        """
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r}; the models of the recipe cifar10 are {', '.join(MODELS)}")
        folder = data_folder(data)
        (images, labels), test = read_images(folder, "train"), read_images(folder, "test")
        training, validation = hold_out(labels, CLASSES)
        splits = {"train": (images[training], labels[training]), "validation": (images[validation], labels[validation])}
        splits["test"] = test
        self._data = {name: (images.to(device), labels.to(device)) for name, (images, labels) in splits.items()}
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        self._device, self._model, self._width, self._compile = device, model, width, compile
        self.calibration_batches = len(training.split(BATCH_SIZE))

    def build_model(self) -> nn.Module:
        """Return a new network on the device. Its weights are drawn from torch's default random generator."""
        return MODELS[self._model](self._width).to(self._device).to(memory_format=torch.channels_last)

    def train(self, model: nn.Module, epochs: int) -> Iterator[float]:
        """Train a network in place, and yield the mean loss after each epoch.

        The optimizer is SGD with momentum 0.9 and weight decay 1e-4, with batches of 128 images and the learning rate of
        `learning_rate`.

        Args:
            model: the network, in train mode.
            epochs: the length of the schedule.
        """
        run = compiled(model) if self._compile else model
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self._model, epoch, epochs)
            yield self._train_epoch(run, optimizer)

    def evaluate(self, model: nn.Module, split: Split, report: Report = ignore) -> float:
        """Return the fraction of the images of a split that the model classifies correctly."""
        images, labels = self._data[split]
        correct, done = torch.zeros((), dtype=torch.int64, device=self._device), 0
        for batch, target in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
            correct += (self._run(model, batch).argmax(1) == target).sum()
            report(Progress(done := done + len(batch), len(labels)))
        return int(correct) / len(labels)

    def calibrate(self, model: nn.Module) -> Iterator[None]:
        """Run the training images, without augmentation, forward through the model. Yield after each batch."""
        for batch in self._data["train"][0].split(BATCH_SIZE):
            self._run(model, batch)
            yield

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the first 64 test images, normalised, as a tuple of one tensor: float32 [64, 3, 32, 32]."""
        return (self._normalize(self._data["test"][0][:64]),)

    def _train_epoch(self, run: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> float:
        """Train on all training images once, in random order and augmented at random, and return the mean loss.

        Args:
            run: the forward of the network, compiled or not. It takes normalised images and returns logits.
            optimizer: the optimizer of the network's parameters.
        """
        images, labels = self._data["train"]
        # The CPU draws the random numbers, because its generator gives the same ones on every machine. They are moved once.
        order = torch.randperm(len(labels), device="cpu").to(self._device).split(BATCH_SIZE)
        shifts = torch.randint(2 * PADDING + 1, (len(labels), 2), device="cpu").to(self._device).split(BATCH_SIZE)
        flips = (torch.rand(len(labels), dtype=torch.float32, device="cpu") < 0.5).to(self._device).split(BATCH_SIZE)
        total = torch.zeros((), device=self._device)
        for batch, shift, flip in zip(order, shifts, flips, strict=True):
            logits = self._run(run, augment(images[batch], shift, flip))
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        return float(total / len(labels))

    def _run(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return the logits [batch, 10] of the model for images, uint8 [batch, 3, 32, 32]. On a GPU it runs under autocast."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return model(self._normalize(images))

    def _normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 images to float32 in channels-last, with mean 0 and standard deviation 1 over the training images."""
        return ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)


def learning_rate(model: str, epoch: int, epochs: int) -> float:
    """Return the learning rate of an epoch. It is divided by 10 after 1/2 of the epochs and again after 3/4.

    Args:
        model: the name of the network in `MODELS`.
        epoch: the epoch, counted from 0.
        epochs: the number of epochs of the schedule.

    Returns:
        The learning rate.
    """
    drops = (2 * epoch >= epochs) + (4 * epoch >= 3 * epochs)
    return LEARNING_RATES.get(model, 0.1) / 10**drops
