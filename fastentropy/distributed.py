"""Sum statistics over the ranks of torch.distributed."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastentropy.statistics import SiteStatistics, Statistics


def sum_over_ranks(statistics: Statistics) -> Statistics:
    """The statistics of all data-parallel ranks together, on every rank; the given ones without torch.distributed.

    Raises ValueError, on all ranks, where they do not have the same sites.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return statistics
    sites = [(name, site.activation, site.neurons, site.batch_entropies is not None) for name, site in statistics.items()]
    of_ranks: list[list[tuple[str, str, int, bool]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, sites)
    for rank, others in enumerate(of_ranks):
        if others != of_ranks[0]:
            different = sorted({site[0] for site in set(others) ^ set(of_ranks[0])}) or ["their order"]
            raise ValueError(f"ranks 0 and {rank} counted different sites ({', '.join(different)}); run the same model on both")
    if not sites:
        return statistics
    integers = [site.counts for site in statistics.values()]
    integers.append(torch.tensor([[site.nan, site.batches] for site in statistics.values()]))
    *counts, numbers = _all_reduce(integers)
    entropies = iter(_all_reduce([site.batch_entropies for site in statistics.values() if site.batch_entropies is not None]))
    return Statistics(
        {
            name: SiteStatistics(
                site.activation,
                counts[i],
                int(numbers[i, 0]),
                site.batch_entropies if site.batch_entropies is None else next(entropies),
                int(numbers[i, 1]),
            )
            for i, (name, site) in enumerate(statistics.items())
        }
    )


def _all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """The sums of tensors over all ranks: one operation on one buffer, on the device that the backend works on."""
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if dist.get_backend() == "nccl":
        flat = flat.to("cuda")
    dist.all_reduce(flat)
    parts = torch.split(flat.cpu(), [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
