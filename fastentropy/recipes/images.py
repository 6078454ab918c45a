"""The recipe `images`: the user's own images, and a pretrained classifier or one of the user's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastentropy._utils.machine import usable_cores
from fastentropy._utils.timing import measure_seconds
from fastentropy.recipes import Progress, Recipe, Report, Split, ignore
from fastentropy.recipes.image_files import SPLIT_SEED
from fastentropy.recipes.images_data import ImageSet, Pictures, read_image_set
from fastentropy.recipes.images_models import build_network
from fastentropy.recipes.training import Schedule, classification_loss, compiled, draw_crops, random_crops

#: How many images the inputs have for which latency is measured.
LATENCY_BATCH = 16
#: How many images are evaluated at a time.
EVALUATION_BATCH = 128
#: With at most how many images the precision of training is tried on a CPU, which they keep as busy as a whole batch.
CPU_TRIAL = 8
#: The learning rate at its highest, by optimizer.
LEARNING_RATES = {"sgd": 0.02, "adamw": 5e-4}
#: Weight decay by optimizer. Biases and the parameters of normalisations are not decayed.
WEIGHT_DECAY = {"sgd": 1e-4, "adamw": 0.05}
PRECISIONS = ("float32", "bfloat16")
#: A precision below float32 is chosen only if a training step takes less than this share of the time.
WORTHWHILE = 0.95


class Images(Recipe):
    """The recipe `images`. It validates and tests on the splits of the data, or on images held out of the training images.

    Networks and images are in the channels-last memory format, because networks train faster in it, also on a CPU.
    """

    epochs = 3

    def __init__(
        self,
        device: torch.device,
        *,
        model: str | None = None,
        data: str | None = None,
        weights: str | None = None,
        image_size: int = 224,
        images_per_epoch: int | None = None,
        batch_size: int = 64,
        optimizer: str = "sgd",
        learning_rate: float | None = None,
        label_smoothing: float = 0.1,
        ema: float | None = None,
        distill: float | None = None,
        precision: str | None = None,
        cache_gb: float = 4.0,
        compile: bool = False,
        report: Report = ignore,
    ) -> None:
        """Build the network once, to check it, find the images, and decode them if they fit the cache.

        Args:
            device: where the images and the networks are placed.
            model: the network, as for `build_network`. It must be given.
            data: the folder with the images, as for `read_image_set`. It must be given.
            weights: a file with weights, as for `build_network`.
            image_size: height and width in pixels to which the images are brought.
            images_per_epoch: how many of the training images are drawn for an epoch, and for a measurement of entropies. The
                epochs go through all images in turn. None takes all.
            batch_size: the number of images in a batch of training.
            optimizer: "sgd" (with Nesterov momentum 0.9) or "adamw".
            learning_rate: the learning rate at its highest. None takes that of `LEARNING_RATES`.
            label_smoothing: the label smoothing (arXiv 1512.00567), from 0 to 1.
            ema: the decay of a moving average of the weights, which is what training returns. None takes the last weights.
            distill: the temperature of the distillation from the teacher, or None to learn from the labels only.
            precision: "float32" or "bfloat16" (under autocast). None measures which is faster.
            cache_gb: decoded images are kept in memory if all of them need at most this many gigabytes.
            compile: whether the network is compiled with torch.compile for training.
            report: called with the progress of decoding the images.

        Raises:
            ValueError: an option is missing or unknown, or the data, the weights or the network cannot be used.
        """
        if model is None:
            raise ValueError("the recipe images needs a network: --model efficientnet_lite0, or the name of one of torchvision")
        if data is None:
            raise ValueError("the recipe images needs its data: --data FOLDER with a folder for each class, or parquet files")
        self._device, self._model, self._weights = device, model, Path(weights) if weights else None
        self._size, self._batch_size, self._compile = image_size, batch_size, compile
        self._optimizer, self._rate = optimizer, LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        self._smoothing, self._ema, self._distill = label_smoothing, ema, distill
        found = read_image_set(Path(data))
        self._classes = found.classes
        with torch.random.fork_rng(devices=[]):
            network = build_network(model, self._weights, self._classes, image_size)
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] * 255 for values in network.pixels)
        data_note = self._read(found, cache_gb, report)
        available = len(self._labels["train"])
        self._images_per_epoch = min(images_per_epoch or available, available)
        self.calibration_batches = -(-self._images_per_epoch // EVALUATION_BATCH)
        speeds = {} if precision else self._measure_precisions(network.model)
        self._precision = precision or _fastest(speeds)
        self.chosen: Mapping[str, Any] = {"precision": self._precision}
        self.protected: Sequence[str] = network.protected
        self.untrained = network.untrained
        rates = ", ".join(f"{name} {speed:.0f} images/s" for name, speed in speeds.items())
        measured = [f"trains in {self._precision} (measured: {rates})"] if speeds else []
        self.notes: Sequence[str] = (*network.notes, data_note, *measured)

    def build_model(self) -> nn.Module:
        """Return the network on the device, with its first weights. New layers are drawn from torch's default generator."""
        model = build_network(self._model, self._weights, self._classes, self._size).model
        return model.to(self._device).to(memory_format=torch.channels_last)

    def train(self, model: nn.Module, epochs: int) -> Iterator[Progress]:
        """Train a network in place, and yield after each batch.

        The learning rate rises in a line and falls as half a cosine. Images are cropped and mirrored at random.

        Args:
            model: the network, in train mode.
            epochs: the length of the schedule.
        """
        schedule = Schedule(len(self._labels["train"]), self._images_per_epoch, self._batch_size, epochs)
        run = compiled(model) if self._compile else model
        optimizer, average = self._make_optimizer(model), _moving_average(model, self._ema)
        order = schedule.draw_order()
        with schedule.batch_norm_momentum(model):
            for step, (batch, images) in enumerate(zip(order, self._pictures["train"].batches(order), strict=True)):
                for group in optimizer.param_groups:
                    group["lr"] = self._rate * schedule.share_of_rate(step)
                crops = random_crops(images, draw_crops(len(batch), self._device))
                loss = self._loss(run, crops, self._labels["train"][batch.to(self._device)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if average is not None:
                    average.update_parameters(model)
                yield Progress((step + 1) * schedule.batch_size, schedule.images, loss.detach())
        if average is not None:
            model.load_state_dict(average.module.state_dict())

    def evaluate(self, model: nn.Module, split: Split, report: Report = ignore) -> float:
        """Return the fraction of the images of a split that the model classifies correctly."""
        labels, done = self._labels[split], 0
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        order = torch.arange(len(labels), device="cpu").split(EVALUATION_BATCH)
        for batch, images in zip(order, self._pictures[split].batches(order), strict=True):
            correct += (self._run(model, images).argmax(1) == labels[batch.to(self._device)]).sum()
            done += len(batch)
            report(Progress(done, len(labels)))
        return int(correct) / len(labels)

    def calibrate(self, model: nn.Module) -> Iterator[Progress]:
        """Run training images forward through the model, and yield after each batch.

        They are as many as an epoch has, and the same each time.
        """
        generator, done = torch.Generator().manual_seed(SPLIT_SEED), 0
        drawn = torch.randperm(len(self._labels["train"]), generator=generator, device="cpu")[: self._images_per_epoch]
        order = drawn.sort().values.split(EVALUATION_BATCH)
        for batch, images in zip(order, self._pictures["train"].batches(order), strict=True):
            self._run(model, images)
            done += len(batch)
            yield Progress(done, len(drawn))

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the first 16 test images, normalised, as a tuple of one tensor: float32 [16, 3, size, size]."""
        return (self._normalize(self._examples),)

    def _read(self, found: ImageSet, cache_gb: float, report: Report) -> str:
        """Prepare to read the images, decode them if they fit the cache, and return a sentence about them for the user.

        Args:
            found: the images.
            cache_gb: the size of the cache in gigabytes.
            report: called with the progress of decoding.
        """
        total = sum(len(split.labels) for split in found.splits.values())
        gigabytes, done = total * 3 * self._size**2 / 1e9, 0
        self._labels = {name: split.labels.to(self._device) for name, split in found.splits.items()}
        self._pictures = {
            name: Pictures(split.sources, self._size, workers=usable_cores() - 1, device=self._device)
            for name, split in found.splits.items()
        }
        if keep := gigabytes <= cache_gb:
            for pictures in self._pictures.values():
                for count in pictures.keep():
                    done += count
                    report(Progress(done, total))
        self._examples = self._first_images("test", LATENCY_BATCH)
        counts = ", ".join(f"{len(labels):,} for {name}" for name, labels in self._labels.items())
        held_out = f"; held out of the training images: {', '.join(found.held_out)}" if found.held_out else ""
        where = "decoded in memory" if keep else f"decoded for each batch, as they take more than --cache-gb {cache_gb:g}"
        return f"{self._classes} classes, {counts}{held_out}; {where} ({gigabytes:.2f} GB)"

    def _first_images(self, split: Split | Literal["train"], count: int) -> Tensor:
        """Return the first images of a split, uint8 [count, 3, size, size]; fewer if it has fewer."""
        indices = torch.arange(min(count, len(self._labels[split])), device="cpu")
        (images,) = self._pictures[split].batches([indices])
        return images

    def _loss(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a network, and of what it learns from the teacher if there is one.

        Args:
            run: the forward of the network, compiled or not.
            images: float32 [batch, 3, size, size], from 0 to 255.
            labels: int64 [batch].
        """
        taught = None
        if self.teacher is not None and self._distill is not None:
            with torch.no_grad():
                taught = self._run(self.teacher.eval(), images)
        return classification_loss(self._run(run, images), labels, self._smoothing, taught, self._distill or 1.0)

    def _run(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return the logits [batch, classes] of the model for images from 0 to 255, under autocast if that was chosen."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            return model(self._normalize(images))

    def _normalize(self, images: Tensor) -> Tensor:
        """Normalise images from 0 to 255 to float32 in channels-last, as the network expects them."""
        return ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a network. Only weights of two axes and more are decayed."""
        decay = WEIGHT_DECAY[self._optimizer]
        decayed = {"params": [each for each in model.parameters() if each.ndim > 1], "weight_decay": decay}
        others = {"params": [each for each in model.parameters() if each.ndim <= 1], "weight_decay": 0.0}
        if self._optimizer == "adamw":
            return torch.optim.AdamW([decayed, others], lr=self._rate)
        return torch.optim.SGD([decayed, others], lr=self._rate, momentum=0.9, nesterov=True)

    def _measure_precisions(self, model: nn.Module) -> dict[str, float]:
        """Return how many images a second are trained in each precision that the device has."""
        model = model.to(self._device).to(memory_format=torch.channels_last).train()
        count = self._batch_size if self._device.type == "cuda" else min(self._batch_size, CPU_TRIAL)
        images, speeds = self._first_images("train", count), {}
        labels = self._labels["train"][: len(images)]

        def step() -> None:
            """Run the network forward and backward."""
            self._loss(model, images, labels).backward()

        for precision in PRECISIONS:
            if precision == "bfloat16" and self._device.type == "cuda" and not torch.cuda.is_bf16_supported():
                continue
            self._precision = precision
            step()
            speeds[precision] = len(labels) / min(measure_seconds(step) for _ in range(2))
        return speeds


def _fastest(speeds: Mapping[str, float]) -> str:
    """Return the precision to train in: float32, unless another one is clearly faster."""
    best = max(speeds, key=lambda name: speeds[name])
    return best if speeds["float32"] < WORTHWHILE * speeds[best] else "float32"


def _moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Return the moving average of a model's weights and buffers, or None without a decay."""
    return None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
