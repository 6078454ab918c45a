"""Hold the counters of all sites (calls of activations) of a model in flat int64 buffers, with a view for each site."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy._compat import add_to_each
from fastentropy.sites.site import Site
from fastentropy_kernels import ActivationPlan


class SiteCounters(NamedTuple):
    """The counters of one site on one device; both tensors are views of a flat buffer."""

    counts: Tensor  # int64 [neurons, 3]: how many values were off, zero and on
    positions: Tensor  # int64 []: how many values of each neuron were read, besides those in `Counters.host_positions`


class Layout:
    """Give each site a slot in a flat buffer. New slots are appended, and a slot never moves."""

    def __init__(self) -> None:
        """Begin without sites."""
        self.size = 0
        self._lock = threading.Lock()
        self._slots: dict[str, tuple[int, int]] = {}

    def slot(self, site: Site) -> tuple[int, int]:
        """Return the index at which the slot of a site begins, and the site's number of neurons.

        A slot holds 3 counts for each neuron, then the number of positions (values read per neuron). A new site gets a new
        slot.
        """
        with self._lock:
            if site.name not in self._slots:
                start, self.size = self.size, self.size + 3 * site.neurons + 1
                self._slots[site.name] = (start, site.neurons)
            return self._slots[site.name]


class Counters:
    """Hold the counts of the sites of a layout, on every device on which the sites ran.

    A buffer keeps its address as long as this object lives, because captured CUDA graphs write to it. Sites that run for the
    first time after a buffer was allocated get a further buffer on that device.

    Attributes:
        sites: the sites that were counted since `clear`, by name.
        plans: the prepared kernel launch that adds to these counters, by name of the site.
        buffers: for each device, its int64 buffers by the index in the layout at which they begin.
        views: the counters of a site on a device, by (name of the site, device).
        host_positions: how many values of each neuron were read, by name of the site. Only the values whose number the host
            knows are included; the others are in `SiteCounters.positions`.
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
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}  # id of a mask -> the mask, its number of tokens
        self._masked: list[tuple[Tensor, Tensor]] = []  # a counter of positions, and the number that `flush` adds to it
        self._repeated: list[tuple[Tensor, int]] = []  # the same, for numbers that the host knows

    def of(self, site: Site, device: torch.device) -> SiteCounters:
        """Return the counters of a site on a device, so that the caller can add to them. The site is then in `sites`."""
        self.sites.setdefault(site.name, site)
        view = self.views.get((site.name, device))
        if view is None:
            view = self.views[site.name, device] = self._view(site, device)
        return view

    def repeats_shape(self, site: Site, x: Tensor) -> bool:
        """Return whether the previous call of a site had an input of the same shape as `x`.

        Only then is a plan (a prepared kernel launch) worthwhile: padded batches vary in shape, so a plan would be wasted.
        """
        before, self._shapes[site.name] = self._shapes.get(site.name), x.shape
        return before == x.shape

    def add_positions(self, site: Site, positions: int) -> None:
        """Record on the host that `positions` values of each neuron were read. The site is then in `sites`."""
        self.sites[site.name] = site
        self.host_positions[site.name] = self.host_positions.get(site.name, 0) + positions

    def add_masked_positions(self, counter: SiteCounters, mask: Tensor) -> None:
        """Record how many values of each neuron were read; `flush` adds this number on the device.

        The number is that of the True entries of `mask`. The host does not read it, because it would have to wait for the
        device.

        Args:
            counter: the counters of the site on the device of the mask.
            mask: bool, True at the positions that were counted.
        """
        if id(mask) not in self._tokens:
            self._tokens[id(mask)] = (mask, mask.sum())
        self._masked.append((counter.positions, self._tokens[id(mask)][1]))

    def add_repeated_positions(self, counter: SiteCounters, positions: int) -> None:
        """Record how many values of each neuron were read; `flush` adds this number on the device.

        While a CUDA graph is captured, this addition becomes a part of the graph, so each replay repeats it.

        Args:
            counter: the counters of the site on the device of the graph.
            positions: the number of values of each neuron.
        """
        self._repeated.append((counter.positions, positions))

    def flush(self) -> None:
        """Add the recorded numbers of positions to the counters on the device.

        One operation adds the numbers of all sites, because one operation per site would take longer than the counting.
        """
        for noted in (self._masked, self._repeated):
            if noted:
                add_to_each(*zip(*noted, strict=True))
        self._forget_notes()

    def _forget_notes(self) -> None:
        """Delete the numbers that `flush` would add."""
        self._tokens.clear()
        self._masked.clear()
        self._repeated.clear()

    def add(self, other: "Counters") -> None:
        """Add the counts of `other`, which has the same layout.

        Where a device has equal buffers in both, one operation adds a whole buffer. Otherwise each site is added by itself.
        """
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
        """Return empty counters with buffers of the same extents, so that `add` can add whole buffers."""
        other = Counters(self._layout)
        with torch.inference_mode(False):  # a tensor of inference mode could not be changed outside it
            other.buffers = {
                device: {start: torch.zeros_like(buffer) for start, buffer in buffers.items()}
                for device, buffers in self.buffers.items()
            }
        return other

    def same_layout(self, other: "Counters") -> bool:
        """Return whether `other` has buffers of the same extents on each device on which this object has buffers."""
        return all(other.extents(device) == self.extents(device) for device in self.buffers)

    def extents(self, device: torch.device) -> list[tuple[int, int]]:
        """Return, for each buffer on a device, the index in the layout at which it begins, and its size."""
        return [(start, buffer.numel()) for start, buffer in self.buffers.get(device, {}).items()]

    def clear(self) -> None:
        """Set all counts to zero and forget the sites. Buffers keep their addresses."""
        for buffers in self.buffers.values():
            for buffer in buffers.values():
                buffer.zero_()
        self.sites.clear()
        self.host_positions.clear()
        self._forget_notes()

    def total(self, site: Site) -> tuple[Tensor, int]:
        """Sum the counters of a site over all devices.

        Returns:
            The counts on the CPU, int64 [neurons, 3], and how many values of each neuron were read, including NaN.
        """
        counts, positions = torch.zeros(site.neurons, 3, dtype=torch.int64), self.host_positions.get(site.name, 0)
        for (name, _), view in self.views.items():
            if name == site.name:
                counts += view.counts.cpu()
                positions += int(view.positions)
        return counts, positions

    def _view(self, site: Site, device: torch.device) -> SiteCounters:
        """Return views of a site's slot on a device.

        If no buffer on this device covers the slot, allocate one that reaches to the end of the layout.
        """
        offset, neurons = self._layout.slot(site)
        buffers = self.buffers.setdefault(device, {})
        start = next((start for start, buffer in buffers.items() if start <= offset < start + buffer.numel()), None)
        if start is None:
            start = sum(buffer.numel() for buffer in buffers.values())
            with torch.inference_mode(False):  # a tensor of inference mode could not be changed outside it
                buffers[start] = torch.zeros(self._layout.size - start, dtype=torch.int64, device=device)
        slot = buffers[start][offset - start : offset - start + 3 * neurons + 1]
        return SiteCounters(slot[:-1].view(neurons, 3), slot[-1])
