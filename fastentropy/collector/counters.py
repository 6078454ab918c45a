"""Hold the counters of all sites of a model: one flat int64 buffer per device, with a view for each site."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy._compat import add_to_each
from fastentropy.sites.site import Site
from fastentropy_kernels import ActivationPlan


class SiteCounters(NamedTuple):
    """The counters of one site on one device, views of the flat buffer."""

    counts: Tensor  # int64 [neurons, 3]
    positions: Tensor  # int64 [], how many values of each neuron were read, without those in `Counters.host_positions`


class Layout:
    """Where each site lies in a flat buffer. Sites are appended and never move."""

    def __init__(self) -> None:
        """Begin without sites."""
        self.size = 0
        self._lock = threading.Lock()
        self._slots: dict[str, tuple[int, int]] = {}

    def slot(self, site: Site) -> tuple[int, int]:
        """Return where a site begins and how many neurons it has: 3 counts for each, then one number of positions."""
        with self._lock:
            if site.name not in self._slots:
                start, self.size = self.size, self.size + 3 * site.neurons + 1
                self._slots[site.name] = (start, site.neurons)
            return self._slots[site.name]


class Counters:
    """The counts of the sites of a layout, on every device where they were met.

    A buffer keeps its address as long as the counters live, for CUDA graphs. Sites that are met after a buffer was allocated
    get another buffer on that device.

    Attributes:
        sites: the sites that were counted since `clear`, by name.
        plans: the prepared launch for each site's view here, by name of the site.
        buffers: for each device, the buffers by where they begin in the layout.
        views: the counters of a site on a device.
        host_positions: how many values of each neuron were read, by site, as far as the host knows it.
    """

    def __init__(self, layout: Layout) -> None:
        """Begin with nothing counted."""
        self.sites: dict[str, Site] = {}
        self.plans: dict[str, ActivationPlan] = {}
        self.buffers: dict[torch.device, dict[int, Tensor]] = {}
        self.views: dict[tuple[str, torch.device], SiteCounters] = {}
        self.host_positions: dict[str, int] = {}
        self._layout = layout
        self._shapes: dict[str, torch.Size] = {}
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the mask: the mask, its number of tokens
        self._masked: list[tuple[Tensor, Tensor]] = []  # a counter of positions, and what `flush` adds
        self._repeated: list[tuple[Tensor, int]] = []

    def of(self, site: Site, device: torch.device) -> SiteCounters:
        """Return the counters of a site on a device, to be added to; the site is among `sites` from then on."""
        self.sites.setdefault(site.name, site)
        view = self.views.get((site.name, device))
        if view is None:
            view = self.views[site.name, device] = self._view(site, device)
        return view

    def repeats_shape(self, site: Site, x: Tensor) -> bool:
        """Return whether the last call of a site had the same shape. Padded batches vary in shape; a plan would be wasted."""
        before, self._shapes[site.name] = self._shapes.get(site.name), x.shape
        return before == x.shape

    def add_positions(self, site: Site, positions: int) -> None:
        """Note on the host how many values of each neuron were read; the site is among `sites` from then on."""
        self.sites[site.name] = site
        self.host_positions[site.name] = self.host_positions.get(site.name, 0) + positions

    def add_masked_positions(self, counter: SiteCounters, mask: Tensor) -> None:
        """Note on the device that as many values of each neuron were read as a mask has tokens."""
        if id(mask) not in self._tokens:
            self._tokens[id(mask)] = (mask, mask.sum())
        self._masked.append((counter.positions, self._tokens[id(mask)][1]))

    def add_repeated_positions(self, counter: SiteCounters, positions: int) -> None:
        """Note on the device, where a CUDA graph repeats it, how many values of each neuron were read."""
        self._repeated.append((counter.positions, positions))

    def flush(self) -> None:
        """Add the notes on the device for all sites in one operation: one for each would take longer than the counting."""
        for noted in (self._masked, self._repeated):
            if noted:
                add_to_each(*zip(*noted, strict=True))
        self._forget_notes()

    def _forget_notes(self) -> None:
        self._tokens.clear()
        self._masked.clear()
        self._repeated.clear()

    def add(self, other: "Counters") -> None:
        """Add counters of the same layout, in one addition per device where both allocated their buffers alike."""
        views = {place: view for place, view in other.views.items() if place[0] in other.sites}
        mine = {(name, device): self.of(other.sites[name], device) for name, device in views}
        for device in {device for _, device in views}:
            if self.extents(device) == other.extents(device):
                for start, buffer in other.buffers[device].items():
                    self.buffers[device][start].add_(buffer)
                continue
            for place, view in views.items():
                if place[1] == device:
                    mine[place].counts.add_(view.counts)
                    mine[place].positions.add_(view.positions)
        for name, positions in other.host_positions.items():
            self.host_positions[name] = self.host_positions.get(name, 0) + positions

    def empty_like(self) -> "Counters":
        """Return empty counters with buffers like these, so that they can be added in one operation per device."""
        other = Counters(self._layout)
        with torch.inference_mode(False):  # or they could be added to in inference mode only
            other.buffers = {
                device: {start: torch.zeros_like(buffer) for start, buffer in buffers.items()}
                for device, buffers in self.buffers.items()
            }
        return other

    def same_layout(self, other: "Counters") -> bool:
        """Return whether both have buffers at the same places, on each device where this one has any."""
        return all(other.extents(device) == self.extents(device) for device in self.buffers)

    def extents(self, device: torch.device) -> list[tuple[int, int]]:
        """Return where each buffer on a device begins in the layout, and its size."""
        return [(start, buffer.numel()) for start, buffer in self.buffers.get(device, {}).items()]

    def clear(self) -> None:
        """Forget what was counted; buffers stay where they are."""
        for buffers in self.buffers.values():
            for buffer in buffers.values():
                buffer.zero_()
        self.sites.clear()
        self.host_positions.clear()
        self._forget_notes()

    def total(self, site: Site) -> tuple[Tensor, int]:
        """Return the counts of a site on the CPU, int64 [neurons, 3], and how many values of each neuron were read."""
        counts, positions = torch.zeros(site.neurons, 3, dtype=torch.int64), self.host_positions.get(site.name, 0)
        for (name, _), view in self.views.items():
            if name == site.name:
                counts += view.counts.cpu()
                positions += int(view.positions)
        return counts, positions

    def _view(self, site: Site, device: torch.device) -> SiteCounters:
        offset, neurons = self._layout.slot(site)
        buffers = self.buffers.setdefault(device, {})
        start = next((start for start, buffer in buffers.items() if start <= offset < start + buffer.numel()), None)
        if start is None:
            start = sum(buffer.numel() for buffer in buffers.values())
            with torch.inference_mode(False):  # or they could be added to in inference mode only
                buffers[start] = torch.zeros(self._layout.size - start, dtype=torch.int64, device=device)
        slot = buffers[start][offset - start : offset - start + 3 * neurons + 1]
        return SiteCounters(slot[:-1].view(neurons, 3), slot[-1])
