"""Hold the counters of all sites (calls of activations) of a model in flat int64 buffers, with a slot for each site."""

import threading
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy._compat import add_to_each
from fastentropy.sites.activations import FusedActivation
from fastentropy.sites.graphs import NamedSites
from fastentropy.sites.site import Site
from fastentropy_kernels import ActivationPlan, CountPlan

#: How many integers a buffer may have beyond those of the sites that are known when it is allocated.
_SPARE = 1024


class SiteCounters(NamedTuple):
    """The counters of one site on one device, in a flat buffer."""

    buffer: Tensor  # int64
    offset: int  # where the slot of the site begins in the buffer
    neurons: int

    @property
    def counts(self) -> Tensor:
        """Return a view, int64 [neurons, 3]: how many values were off, zero and on."""
        return self.buffer.as_strided((self.neurons, 3), (3, 1), self.offset)

    @property
    def slot(self) -> Tensor:
        """Return the counts and the positions as a view, int64 [3 * neurons + 1]."""
        return self.buffer[self.offset : self.offset + 3 * self.neurons + 1]

    @property
    def positions(self) -> Tensor:
        """Return a view, int64 []: how many values of each neuron were read, besides those in `Counters.host_positions`."""
        return self.buffer[self.offset + 3 * self.neurons]


class Slot(NamedTuple):
    """Where the counters of a site lie in a flat buffer."""

    start: int
    neurons: int

    @property
    def stop(self) -> int:
        """Return the index behind the slot."""
        return self.start + 3 * self.neurons + 1


class SitePlan(NamedTuple):
    """A prepared launch of the kernel for one site, and what it was made from. Sites with inputs alike share the launch."""

    plan: ActivationPlan
    counter: SiteCounters  # what the launch adds to
    fused: FusedActivation  # the activation, as it was read from the module
    site: Site
    positions: int | None  # how many values of each neuron are read; None if `add_positions` decides in each call


class SiteCountPlan(NamedTuple):
    """A prepared launch of the kernel that only counts, for one site. Sites with inputs alike share the launch."""

    plan: CountPlan
    counter: SiteCounters  # what the launch adds to
    site: Site
    positions: int | None  # as for `SitePlan`


class Layout:
    """Give each site a slot in a flat buffer. New slots are appended, and a slot never moves."""

    def __init__(self) -> None:
        """Begin without sites."""
        self.size = 0
        self._lock = threading.Lock()
        self._slots: dict[str, Slot] = {}
        self._starts: list[int] = []

    def slot(self, site: Site) -> Slot:
        """Return the slot of a site.

        A slot holds 3 counts for each neuron, then the number of positions (values read per neuron). A new site gets a new
        slot.
        """
        with self._lock:
            if site.name not in self._slots:
                slot = self._slots[site.name] = Slot(self.size, site.neurons)
                self._starts.append(slot.start)
                self.size = slot.stop
            return self._slots[site.name]

    def find(self, name: str) -> Slot | None:
        """Return the slot of the site with a name, or None if it has none."""
        return self._slots.get(name)

    def last_boundary(self, index: int) -> int:
        """Return the last index, up to the given one, at which a slot begins or the last slot ends."""
        with self._lock:
            return self.size if index >= self.size else self._starts[bisect(self._starts, index) - 1]


class Counters:
    """Hold the counts of the sites of a layout, on every device on which the sites ran.

    A buffer keeps its address as long as this object lives, because captured CUDA graphs write to it. Sites that run for the
    first time after a buffer was allocated get a further buffer on that device. A further buffer has a little room to spare, so
    that there are few of them even if thousands of small sites come one by one.

    Attributes:
        sites: the sites that were counted since `clear`, by name.
        plans: the prepared kernel launch of each site, by name.
        plans_of_class: the latest one for modules of a class, which further sites share.
        count_plans: the prepared launch of each site, by name, where the kernel only counts.
        latest_count_plan: the latest one, which further sites share.
        gated_plans: the prepared launch of each site that multiplies as well, by name, and the latest one for modules of a
            class; None if there is none.
        deferred: runs an activation that waits to be multiplied; None if none waits.
        unplanned: the shape and strides of inputs for which no launch that counts could be prepared, by name of the site.
        buffers: for each device, its int64 buffers by the index in the layout at which they begin.
        views: the counters of a site on a device, by (name of the site, device).
        host_positions: how many values of each neuron were read, by name of the site. Only the values whose number the host
            knows are included; the others are in `SiteCounters.positions`.
    """

    def __init__(self, layout: Layout) -> None:
        """Begin with nothing counted."""
        self.sites: dict[str, Site] = {}
        self.plans: dict[str, SitePlan] = {}
        self.plans_of_class: dict[type, SitePlan] = {}
        self.count_plans: dict[str, SiteCountPlan] = {}
        self.latest_count_plan: SiteCountPlan | None = None
        self.gated_plans: dict[str | type, SitePlan | None] = {}
        self.deferred: Callable[[], object] | None = None
        self.unplanned: dict[str, tuple[torch.Size, Sequence[int]]] = {}
        self.buffers: dict[torch.device, dict[int, Tensor]] = {}
        self.views: dict[tuple[str, torch.device], SiteCounters] = {}
        self.host_positions: dict[str, int] = {}
        self._layout = layout
        self._parts: dict[tuple[NamedSites, torch.device], list[tuple[Tensor, Tensor]]] = {}
        self._starts: dict[torch.device, list[int]] = {}  # the keys of `buffers`, in rising order
        self._calls: dict[str | type, tuple[torch.Size, FusedActivation | None]] = {}
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

    def repeats_call(self, site: Site, x: Tensor, fused: FusedActivation | None) -> bool:
        """Return whether the previous call of a site had an input of the same shape, and the same activation.

        The previous call may also be one of another site whose module has the same class. Only then is a plan (a prepared
        kernel launch) worthwhile: padded batches vary in shape, and a slope that is annealed varies too, so a plan would be
        wasted.

        Args:
            site: the site.
            x: its input.
            fused: the activation that the kernel computes; None if it only counts.
        """
        call, kind = (x.shape, fused), type(None) if fused is None else fused.kind
        before = self._calls.get(site.name), self._calls.get(kind)
        self._calls[site.name] = self._calls[kind] = call
        return call in before

    def add_slots(self, named: NamedSites, flat: Tensor) -> None:
        """Add the counts of a compiled graph.

        Args:
            named: the sites of the graph. A site that is left out is None.
            flat: int64, for each site, one after the other: how many values of each neuron are off, then zero, then on, and
                the number of positions.
        """
        parts = self._parts.get((named, flat.device))
        if parts is None:
            parts = self._parts[named, flat.device] = self._overlaps(named, flat.device)
        self.sites.update(named.by_name)
        if parts:
            add_to_each([part for part, _ in parts], [flat.index_select(0, order) for _, order in parts])

    def _overlaps(self, named: NamedSites, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return the parts of the buffers that get the counts of a graph, and the indices of their counts in its output.

        The slots of sites that were discovered one after another are one part.
        """
        parts: list[tuple[Tensor, int, list[Tensor]]] = []  # a buffer, the index at which the next slot begins, and the indices
        start = 0
        for site, neurons in zip(named.sites, named.neurons, strict=True):
            stop = start + 3 * neurons + 1
            if site is not None:
                buffer, offset, _ = self.of(site, device)
                order = torch.arange(start, stop, device="cpu")
                order = torch.cat([order[:-1].view(3, neurons).t().flatten(), order[-1:]])
                if not (parts and parts[-1][0] is buffer and parts[-1][1] == offset):
                    parts.append((buffer, offset, []))
                parts[-1] = (buffer, offset + order.numel(), [*parts[-1][2], order])
            start = stop
        indices = [(buffer, end, torch.cat(orders)) for buffer, end, orders in parts]
        return [(buffer[end - order.numel() : end], order.to(device)) for buffer, end, order in indices]

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
        """Add the counts of `other`, which has the same layout. One operation adds a whole buffer, or what overlaps of two."""
        for device, buffers in other.buffers.items():
            if not buffers:
                continue
            stop = min(self._layout.size, max(start + buffer.numel() for start, buffer in buffers.items()))
            starts, mine = self._cover(device, stop), self.buffers[device]
            for start, buffer in buffers.items():
                for begin, end in zip(starts, [*starts[1:], stop], strict=True):
                    first, last = max(start, begin), min(start + buffer.numel(), end)
                    if first < last:
                        mine[begin][first - begin : last - begin].add_(buffer[first - start : last - start])
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
        other._starts = {device: list(starts) for device, starts in self._starts.items()}
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
        self.deferred = None
        self.sites.clear()
        self.host_positions.clear()
        self._forget_notes()

    def totals(self, sites: Iterable[Site]) -> dict[str, tuple[Tensor, int]]:
        """Sum the counters of sites over all devices.

        Args:
            sites: the sites. Those that never ran are left out.

        Returns:
            By name of the site: the counts on the CPU, int64 [neurons, 3], and how many values of each neuron were read,
            including NaN.
        """
        slots = {site.name: slot for site in sites if (slot := self._layout.find(site.name))}
        flat = torch.zeros(self._layout.size, dtype=torch.int64, device="cpu")
        for buffers in self.buffers.values():
            for start, buffer in buffers.items():
                part = flat[start : start + buffer.numel()]
                part.add_(buffer[: part.numel()].cpu())
        last = torch.tensor([slot.stop - 1 for slot in slots.values()], dtype=torch.int64, device="cpu")
        return {
            name: (flat[slot.start : slot.stop - 1].view(slot.neurons, 3).clone(), positions + self.host_positions.get(name, 0))
            for (name, slot), positions in zip(slots.items(), flat[last].tolist(), strict=True)
        }

    def _view(self, site: Site, device: torch.device) -> SiteCounters:
        """Return the counters of a site on a device."""
        slot = self._layout.slot(site)
        starts = self._cover(device, slot.stop)
        start = starts[bisect(starts, slot.start) - 1]
        return SiteCounters(self.buffers[device][start], slot.start - start, slot.neurons)

    def _cover(self, device: torch.device, stop: int) -> list[int]:
        """Return the indices at which the buffers on a device begin.

        If no buffer on this device reaches up to the index `stop`, allocate one that reaches at least to the end of the layout.
        """
        buffers, starts = self.buffers.setdefault(device, {}), self._starts.setdefault(device, [])
        end = starts[-1] + buffers[starts[-1]].numel() if starts else 0
        if stop > end:
            start = self._layout.last_boundary(end)  # a slot that would reach beyond the buffers lies in the new one
            size = max(self._layout.size - start, min(end // 4, _SPARE))
            with torch.inference_mode(False):  # a tensor of inference mode could not be changed outside it
                buffers[start] = torch.zeros(size, dtype=torch.int64, device=device)
            starts.append(start)
        return starts
