"""Measure the entropies of an image classifier over the user's images."""

import warnings
from collections.abc import Sequence

import torch

from fastentropy._utils.machine import usable_cores
from fastentropy.collector.api import collect
from fastentropy.collector.statistics import Statistics
from fastentropy.recipes import Progress, Report, ignore
from fastentropy.recipes.images_data import Pictures, Source
from fastentropy.recipes.images_models import Network

#: The seed by which images are drawn.
_SEED = 0


def draw_sources(sources: Sequence[Source], count: int | None) -> list[Source]:
    """Return some of the images, drawn at random but always the same, in their order; all of them without a count."""
    drawn = torch.randperm(len(sources), generator=torch.Generator().manual_seed(_SEED), device="cpu")[:count]
    return [sources[index] for index in drawn.sort().values.tolist()]


def collect_statistics(
    network: Network, sources: Sequence[Source], *, size: int, batch_size: int, device: torch.device, report: Report = ignore
) -> Statistics:
    """Run images forward through a network, and count the states of its activations.

    Args:
        network: the network, which is moved to the device.
        sources: the images.
        size: the height and width to which they are brought, in pixels.
        batch_size: how many images a batch has.
        device: where the network runs.
        report: called with the progress.

    Returns:
        The statistics of all activations.

    Raises:
        ValueError: an image cannot be decoded, or the network calls no known activation.
    """
    model = network.model.to(device).eval()
    mean, std = (torch.tensor(values, device=device)[:, None, None] * 255 for values in network.pixels)
    pictures = Pictures(sources, size, workers=usable_cores() - 1, device=device)
    order, done = torch.arange(len(sources), device="cpu").split(batch_size), 0
    with warnings.catch_warnings(), torch.no_grad(), collect(model) as collector:
        warnings.filterwarnings("ignore", message=".*fe.isolate")  # there is nobody who could follow this advice
        for batch, images in zip(order, pictures.batches(order), strict=True):
            model((images - mean) / std)
            done += len(batch)
            report(Progress(done, len(sources)))
    return collector.compute()
