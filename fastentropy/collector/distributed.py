"""Combine the statistics of the ranks of torch.distributed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastentropy.collector.reduction import all_reduce, check_backend, counting_device, device_name, reduction_device
from fastentropy.collector.site_statistics import SiteStatistics, batches_of_neurons
from fastentropy.collector.statistics import Statistics
from fastentropy.sites.sharding import RankShare


class _Entry(NamedTuple):
    """The information that a rank sends to all others about a site (call of an activation) that it has counted."""

    activation: str
    share: RankShare  # where the rank's counts belong in the counts of all ranks
    tells_batches_apart: bool  # the rank has entropies per batch, of whole batches
    axis_is_inferred: bool  # the axis of the neurons is a default
    channel_axis: int | None  # the axis of the neurons, counted from the end


class _Rank(NamedTuple):
    """The information that a rank sends to all others."""

    modules: Mapping[str, str]  # dotted path of each activation module in the rank's model -> name of the activation
    sites: dict[str, _Entry]  # by name of the site
    notes: tuple[str, ...]  # what the rank could not count
    device: str  # the name of the device on which it counted


def sum_over_ranks(
    statistics: Statistics,
    shares: Mapping[str, RankShare],
    modules: Mapping[str, str],
    devices: Sequence[torch.device] = (),
) -> Statistics:
    """Combine the statistics of all ranks.

    Ranks whose models have the same activation modules may each lack sites that other ranks counted. Ranks with different
    modules are stages of a pipeline and have no site in common.

    Args:
        statistics: the statistics that this rank has counted.
        shares: where these counts belong in the counts of all ranks, by name of the site.
        modules: the names of the activations of this rank's activation modules, by dotted path.
        devices: the devices on which this rank has counted.

    Returns:
        The combined statistics, which are the same on every rank. Without torch.distributed, the given statistics.

    Raises:
        ValueError: the sites of the ranks do not fit together, a rank's share is unknown, or the process group has no backend
            for a device of this process. All ranks raise.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return statistics
    check_backend()
    own = counting_device(devices)
    ranks = _all_ranks(statistics, shares, modules, device_name(own))
    device = reduction_device([rank.device for rank in ranks], own)
    _check(ranks)
    _check_copies(ranks, statistics)
    parts = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank.sites):
        entries = [rank.sites[name] for rank in ranks if name in rank.sites]
        keeps_batches = all(entry.tells_batches_apart for entry in entries)
        axes = {entry.channel_axis for entry in entries}
        entry = entries[0]._replace(
            axis_is_inferred=any(entry.axis_is_inferred for entry in entries),
            channel_axis=axes.pop() if len(axes) == 1 else None,
        )
        parts[name] = _part(statistics.get(name), shares.get(name), entry, keeps_batches)
    return Statistics(_summed(parts, device), tuple(dict.fromkeys(note for rank in ranks for note in rank.notes)))


def _all_ranks(statistics: Statistics, shares: Mapping[str, RankShare], modules: Mapping[str, str], device: str) -> list[_Rank]:
    """Send this rank's information to all ranks, and return the information of each, by rank."""
    sites = {
        name: _Entry(
            site.activation,
            shares[name],
            site.batch_entropies is not None and shares[name].has_whole_batches,
            site.axis_is_inferred,
            site.channel_axis,
        )
        for name, site in statistics.items()
    }
    ranks = [_Rank({}, {}, (), "")] * dist.get_world_size()
    dist.all_gather_object(ranks, _Rank(modules, sites, statistics.notes, device))
    return ranks


def _check(ranks: Sequence[_Rank]) -> None:
    """Raise ValueError if the ranks' sites do not fit together.

    For each of its sites, a rank is compared with the first rank that also has this site.
    """
    first_ranks: dict[str, int] = {}
    for number, rank in enumerate(ranks):
        for name, entry in rank.sites.items():
            if entry.share.trouble:
                raise ValueError(
                    f"site {name!r} of rank {number} cannot be added to those of other ranks: {entry.share.trouble}"
                )
            first_ranks.setdefault(name, number)
        for first in sorted({first_ranks[name] for name in rank.sites}):
            if different := _differences(ranks[first], rank):
                raise ValueError(
                    f"ranks {first} and {number} counted different sites ({', '.join(different)}); run the same model on both, "
                    "or stages of a pipeline that keep the names that their modules have in the whole model"
                )


def _check_copies(ranks: Sequence[_Rank], statistics: Statistics) -> None:
    """Raise ValueError if a rank is left out as a copy of another one, but no counted rank has the same counts."""
    left_out = {name for rank in ranks for name, entry in rank.sites.items() if not entry.share.is_counted}
    if not left_out:
        return
    digests: list[dict[str, str]] = [{}] * len(ranks)
    own = {name: hashlib.blake2b(statistics[name].counts.numpy().tobytes()).hexdigest() for name in left_out & set(statistics)}
    dist.all_gather_object(digests, own)
    pairs = list(zip(ranks, digests, strict=True))
    counted = {(name, of[name]) for rank, of in pairs for name in of if rank.sites[name].share.is_counted}
    for number, (rank, of) in enumerate(pairs):
        for name, digest in of.items():
            if not rank.sites[name].share.is_counted and (name, digest) not in counted:
                raise ValueError(
                    f"site {name!r} of rank {number} is taken for a copy of another rank's, since the model has DTensors, but "
                    "no rank that is counted has the same counts; make its input a DTensor that knows how it is divided"
                )


def _differences(first: _Rank, other: _Rank) -> list[str]:
    """Return the names of the modules and sites that differ between two ranks with sites in common."""
    modules = {name for name, _ in first.modules.items() ^ other.modules.items()}
    sites = {
        name
        for name in first.sites.keys() & other.sites.keys()
        if (first.sites[name].activation, first.sites[name].share.neurons)
        != (other.sites[name].activation, other.sites[name].share.neurons)
    }
    return sorted(modules | sites)


def _part(site: SiteStatistics | None, share: RankShare | None, entry: _Entry, keeps_batches: bool) -> SiteStatistics:
    """Return the summand of this rank in the global statistics of a site: its own counts at its neurons, and 0 elsewhere.

    Args:
        site: the statistics of this rank, or None if it has none of this site.
        share: where they belong in the counts of all ranks, or None.
        entry: the information of the first rank that has the site.
        keeps_batches: whether every rank with the site has entropies per batch.
    """
    neurons = entry.share.neurons
    counts = torch.zeros(neurons, 3, dtype=torch.int64, device="cpu")
    entropies = torch.zeros(neurons, 2, dtype=torch.float64, device="cpu") if keeps_batches else None
    part = SiteStatistics(
        entry.activation,
        counts,
        0,
        entropies,
        axis_is_inferred=entry.axis_is_inferred,
        channel_axis=entry.channel_axis,
    )
    if site is None or share is None or not share.is_counted:
        return part
    place = slice(share.start, share.start + site.neurons)
    counts[place] = site.counts
    if entropies is not None and site.batch_entropies is not None:
        entropies[place] = site.batch_entropies
    if not keeps_batches:
        return replace(part, nan=site.nan)
    neuron_batches = torch.zeros(neurons, dtype=torch.int64, device="cpu")
    neuron_batches[place] = batches_of_neurons(site)
    return replace(part, nan=site.nan, batches=site.batches if share.is_first else 0, neuron_batches=neuron_batches)


def _summed(parts: Mapping[str, SiteStatistics], device: torch.device) -> dict[str, SiteStatistics]:
    """Sum the parts of each site over all ranks.

    All integers take one collective operation; the entropies per batch, if there are any, take a second one. Both run over the
    backend of `device`.
    """
    numbers = torch.tensor([[part.nan, part.batches] for part in parts.values()], dtype=torch.int64, device="cpu")
    with_batches = [part for part in parts.values() if part.batch_entropies is not None]
    batches = [batches_of_neurons(part) for part in with_batches]
    numbers, *integers = all_reduce([numbers, *(part.counts for part in parts.values()), *batches], device)
    sums = zip(
        all_reduce([part.batch_entropies for part in with_batches if part.batch_entropies is not None], device),
        integers[len(parts) :],
        strict=True,
    )
    summed = {}
    for (name, part), counts, (nan, site_batches) in zip(parts.items(), integers, numbers.tolist(), strict=False):
        summed[name] = replace(part, counts=counts, nan=nan, batches=0, neuron_batches=None)
        if part.batch_entropies is not None:
            entropies, neuron_batches = next(sums)
            # The first neurons may have had no value in a batch in which those of another rank had one.
            most = max(site_batches, int(neuron_batches.max()) if part.neurons else 0)
            summed[name] = replace(summed[name], batch_entropies=entropies, batches=most, neuron_batches=neuron_batches)
    return summed
