"""What is known of a graph of torch.compile in which activations are called."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import Tensor, fx

from fastentropy.sites.naming import PassNames
from fastentropy.sites.padding import TokenAxes
from fastentropy.sites.site import Site

#: In a compiled graph, the producer of a call before which no module of the graph has run: the one that ran before the graph.
BEFORE = object()


class GraphSite(NamedTuple):
    """A call of an activation in a compiled graph, which layers alike may share. Paths are relative to the layer."""

    path: str  # the module, or the module that calls the function
    function: str
    place: object  # as `Places.code_at` returns it
    producer: object  # a path; BEFORE; None if it is not known
    like: Site | None  # the site of the call for which it was compiled; None if the graph does not count the call
    ndim: int  # the number of axes of its input


@dataclass(eq=False)
class GraphSites:
    """The calls of activations in a compiled graph, in the order in which they are made, and of their counts.

    Attributes:
        sites: the calls.
        last: the path of the module that returns last, relative to the layer; None if none does.
    """

    sites: tuple[GraphSite, ...]
    last: str | None


class GraphCall(NamedTuple):
    """A call of an activation in a graph that is about to be compiled."""

    node: fx.Node  # the first node of the call
    x: fx.Node  # the input of the activation
    site: Site
    token_axes: TokenAxes | None  # the axes of the input along which the padding mask lies; None if all positions are counted


#: How the calls of a site are counted: the channel axis, and under a mask the token axes. None if the site is left out.
CountedAxes = tuple[int | None, TokenAxes | None] | None


class ReadGraph(NamedTuple):
    """What was found in a graph that is about to be compiled.

    Attributes:
        calls: the calls that are counted.
        sites: all calls.
        axes: how they are counted, by name of the site.
    """

    calls: list[GraphCall]
    sites: GraphSites
    axes: dict[str, CountedAxes]


@dataclass(eq=False)
class NamedSites:
    """The sites of a graph in a place of the model.

    Attributes:
        sites: the sites of the calls that the graph counts, in the order of the counts; None for a site that is left out.
        neurons: the number of neurons of each.
        names: the names that the graph has given, and the calls that it has made.
        last: the path of the module of the graph that returns last; None if none does.
    """

    sites: tuple[Site | None, ...]
    neurons: tuple[int, ...]
    names: PassNames
    last: str | None

    @cached_property
    def by_name(self) -> dict[str, Site]:
        """Return the sites that are not left out, by name."""
        return {site.name: site for site in self.sites if site is not None}


class GraphReader(Protocol):
    """What finds the sites of the graphs that a pass compiles and runs."""

    @property
    def observed(self) -> Any:
        """Return what the observer knows of the pass of this thread; None if no pass is running."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """Return the padding mask that applies where this thread runs: bool [batch, tokens]."""
        ...

    @property
    def options(self) -> object:
        """Return what graphs depend on besides the axes of sites and the padding mask, hashable."""
        ...

    @property
    def known_sites(self) -> int:
        """Return how many sites are known."""
        ...

    def agrees(self, axes: Mapping[str, CountedAxes], with_mask: bool) -> bool:
        """Return whether sites are counted as in `axes`, with or without a padding mask, as far as they are known."""
        ...

    def read(self, graph_module: fx.GraphModule) -> ReadGraph:
        """Find the calls of activations in a graph that is about to be compiled.

        Raises:
            UncountableGraphError: it is not known which activations are called, or a call belongs to no known site.
        """
        ...

    def enter(self, graph: GraphSites) -> NamedSites:
        """Return the sites of a compiled graph that is about to run."""
        ...
