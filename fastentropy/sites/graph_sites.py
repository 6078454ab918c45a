"""Give the calls of activations in compiled graphs the names and sites that they have in eager mode."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, fx, nn

from fastentropy._compat import Compiler, CompilerWith, UncountableGraphError, UnknownSiteError, size_of
from fastentropy.sites import interception
from fastentropy.sites.activations import registered_in_python, registrations
from fastentropy.sites.graph_calls import GraphTracer, TracedCall
from fastentropy.sites.graphs import BEFORE, CountedAxes, GraphCall, GraphSite, GraphSites, NamedSites, ReadGraph
from fastentropy.sites.modules import WatchedModules
from fastentropy.sites.naming import CallNames, Key, PassNames, Places
from fastentropy.sites.observer import Observer
from fastentropy.sites.padding import TokenAxes, axes_of_mask
from fastentropy.sites.passes import Pass, ThreadState
from fastentropy.sites.registry import SiteRegistry
from fastentropy.sites.site import Site

P = TypeVar("P")


class GraphCaller(Generic[P]):
    """Run compiled code in the passes of a watcher, and find the sites of its graphs.

    Attributes:
        registry: the sites of the watcher.
        thread: what the watcher knows of each thread.
        has_own_mask: the paths of containers that were given another mask than the call around them.
    """

    def __init__(
        self,
        modules: WatchedModules,
        registry: SiteRegistry,
        names: CallNames,
        places: Places,
        thread: ThreadState[P],
        observer: Observer[P],
    ) -> None:
        """Begin without graphs. The arguments are the parts of the watcher."""
        self._modules, self.registry, self._names, self._places = modules, registry, names, places
        self.thread, self._observer = thread, observer
        self.has_own_mask = set[str]()
        self._with_masks = set[str]()
        self._named: dict[tuple[GraphSites, str, str | None], NamedSites] = {}

    @property
    def observed(self) -> P | None:
        """Return what the observer knows of the pass of this thread; None if no pass is running."""
        return None if self.thread.current is None else self.thread.current.observed

    @property
    def options(self) -> object:
        """Return what graphs depend on besides the axes of sites and the padding mask, hashable.

        Sites of models of different classes may have the same names. PyTorch takes care of all other differences of models.
        """
        return self._modules.class_name, registrations()

    def watches(self, module: nn.Module) -> bool:
        """Return whether a module, without those in it, belongs to the model."""
        return self._modules.path_of(module) is not None

    @property
    def known_sites(self) -> int:
        """Return how many sites are known."""
        return len(self.registry.sites)

    def agrees(self, axes: Mapping[str, CountedAxes], with_mask: bool) -> bool:
        """Return whether sites are counted as in `axes`, as far as they are known."""
        known, is_left_out = self.registry.sites, self.registry.is_left_out
        return all(
            is_left_out(name) == (each is None) and (name not in known or self._counted_axes(name, with_mask) == each)
            for name, each in axes.items()
        )

    def _counted_axes(self, name: str, with_mask: bool) -> CountedAxes:
        """Return how the calls of a known site are counted."""
        axis, token_axes = self.registry.axes(name)
        return axis, token_axes if with_mask else None

    def forget(self) -> None:
        """Forget what is known of graphs and masks, because the modules of the model may have changed."""
        self._named.clear()
        self._with_masks.clear()

    def choose_compiler(self, compiler: Compiler) -> Compiler:
        """Return what compiles a function of torch.compile that the pass of this thread is about to call.

        Nothing does in passes in which operators are followed. The code of an activation is counted in front of it.
        """
        current = self.thread.current
        if current is None or current.inside_activation:
            return None if isinstance(compiler, CompilerWith) else compiler
        return self._choose_in(current, compiler)

    def note(self, text: str) -> None:
        """Add a sentence about code that runs eagerly to the notes."""
        self.registry.note(text)

    def _choose_in(self, current: Pass[P], compiler: Compiler) -> Compiler:
        """Return what compiles a function that a pass calls."""
        current.is_compiled = True
        is_new = current.is_token is not None and current.entry not in self._with_masks
        if current.tracker is not None or is_new:
            current.learns_masks |= is_new
            return None
        if hidden := registered_in_python():
            self.registry.note(f"compiled code runs eagerly and is counted there: its graphs do not show calls of {hidden[0]}")
            return None
        return self._observer.choose_compiler(current.observed, self, compiler)

    def end_pass(self, current: Pass[P], completed: bool) -> None:
        """Note which masks apply where, if the pass has shown it."""
        if completed and current.learns_masks:
            self._with_masks.add(current.entry)

    @property
    def mask(self) -> Tensor | None:
        """Return the padding mask that applies where this thread runs: bool [batch, tokens]."""
        return None if self.thread.current is None else self.thread.current.is_token

    def read(self, graph_module: fx.GraphModule) -> ReadGraph:
        """Find the calls of activations in a graph that the pass of this thread is about to run.

        Raises:
            UncountableGraphError: it is not known which activations are called, or a call belongs to no known site.
        """
        current = self.thread.current
        if current is None:
            return ReadGraph([], GraphSites((), None), {})
        owner, others = (
            _owner(current),
            interception.identities_of_others([module for module, _ in self._modules.kinds.values()]),
        )
        tracer = GraphTracer(self._modules, owner, others)
        tracer.follow(graph_module.graph)
        tracer.finish()
        given = PassNames(set(current.names.used), dict(current.names.times))
        calls, sites, axes = list[GraphCall](), list[GraphSite](), dict[str, CountedAxes]()
        for call in tracer.calls:
            name, found = self._site_of(call, owner, given, current)
            sites.append(found)
            if found.like is not None:
                calls.append(GraphCall(call.node, call.x, found.like, self._axes_of_mask(call, found.like, current)))
            if not self.registry.is_left_out(name):
                axes[name] = self._counted_axes(name, self.mask is not None)
            elif found.like is None:
                axes[name] = None
        last = None if tracer.producer is None else _relative(tracer.producer, owner)
        return ReadGraph(calls, GraphSites(tuple(sites), last), axes)

    def _site_of(self, call: TracedCall, owner: str, given: PassNames, current: Pass[P]) -> tuple[str, GraphSite]:
        """Return the name and the site of a call in a graph.

        A call that is left out is counted nevertheless if it is not in other modules, which may share the graph.
        """
        x: Tensor = call.x.meta["example_value"]
        producer = _relative(call.producer, owner) if call.producer is not None else BEFORE
        path = self._path(call.path, call.function)
        for place in self._places_of(call, path):
            key = self._key(_relative(call.path, owner), call.function, place, producer, owner, current)
            name = self._names.known_name(key, given)
            is_left_out = name is not None and self.registry.is_left_out(name)
            site = None if name is None or is_left_out else self.registry.known(name, call.activation, x)
            if name is not None and is_left_out and owner:
                site = self.registry.siblings.site_like(name, call.activation, x)
            if owner and site is not None and (other := self.registry.unlike_sibling(site, x.ndim)):
                raise UncountableGraphError(f"it is shared by {site.name!r} and {other!r}, which have different channel axes")
            if name is not None and (site is not None or is_left_out):
                at = self._places.code_at(place)
                return name, GraphSite(_relative(call.path, owner), call.function, at, producer, site, x.ndim)
        raise UnknownSiteError(f"{path!r} was not called like this before")

    def _axes_of_mask(self, call: TracedCall, site: Site, current: Pass[P]) -> TokenAxes | None:
        """Return the axes of the input of a call along which the positions of the padding mask lie; None if it does not fit."""
        if current.is_token is None:
            return None
        if own := self.has_own_mask.intersection(call.containers):
            raise UncountableGraphError(f"{min(own)!r} has a padding mask of its own")
        x: Tensor = call.x.meta["example_value"]
        shape = [size_of(size) for size in x.shape]
        return axes_of_mask(current.is_token.shape, shape, site.channel_axis, self.registry.token_axes(site, x))

    def _places_of(self, call: TracedCall, path: str) -> Sequence[object]:
        """Return the places in the code that may make a call."""
        if not call.function:
            return [None]
        known = self._names.places_of(path)
        on_line = [] if call.line is None else self._places.on_line(*call.line, known)
        return on_line or known

    def _key(self, path: str, function: str, place: object, producer: object, owner: str, current: Pass[P]) -> Key:
        """Return what tells a call in a graph from others, as in eager mode. The first arguments are those of a `GraphSite`."""
        path = self._modules.path_at(_join(owner, path))
        before = current.produced.path if producer is BEFORE else _join(owner, str(producer))
        if function:
            return self._path(path, function), True, place, before
        if before is not None and path.startswith(f"{before}."):
            before = None
        return path, False, place, before

    def _path(self, owner: str, function: str) -> str:
        """Return the path of a call."""
        return self._modules.function_path(owner, function) if function else owner

    def enter(self, graph: GraphSites) -> NamedSites:
        """Name the calls of a compiled graph that the pass of this thread is about to run, and return their sites."""
        current = self.thread.current
        assert current is not None
        owner = _owner(current)
        key = (graph, owner, current.produced.path)
        named = self._named.get(key)
        given = current.names
        if named is not None and given.used.isdisjoint(named.names.used) and given.times.keys().isdisjoint(named.names.times):
            given.used |= named.names.used
            given.times.update(named.names.times)
        else:
            paths = {_path_of(name) for name in given.used}
            named = self._name(graph, owner, current)
            if paths.isdisjoint(_path_of(name) for name in named.names.used):
                self._named[key] = named
        if named.last is not None and named.last in self._modules.kinds:
            current.produced.set(named.last, self._modules.kinds[named.last][0], None)
        return named

    def _name(self, graph: GraphSites, owner: str, current: Pass[P]) -> NamedSites:
        """Name the calls of a graph, one after the other."""
        before = PassNames(set(current.names.used), dict(current.names.times))
        sites = list[Site | None]()
        for at in graph.sites:
            place = self._places.place_in(at.place)
            name = self._names.name(self._key(at.path, at.function, place, at.producer, owner, current), current.names)
            if at.like is None:
                self.registry.check_left_out(name)
            else:
                sites.append(self.registry.known_or_new(name, at.like, at.ndim))
        used = current.names.used - before.used
        times = {key: number for key, number in current.names.times.items() if before.times.get(key) != number}
        last = None if graph.last is None else _join(owner, graph.last)
        neurons = tuple(at.like.neurons for at in graph.sites if at.like is not None)
        return NamedSites(tuple(sites), neurons, PassNames(used, times), last)


def _path_of(name: str) -> str:
    """Return the path of a call with a name."""
    return name.partition(":")[0]


def _owner(current: Pass[Any]) -> str:
    """Return the path of the container whose forward is running."""
    return current.owners[-1] if current.owners else ""


def _relative(path: str, owner: str) -> str:
    """Return a path as seen from the module at the path `owner`.

    Raises:
        UncountableGraphError: the path is not below it.
    """
    if path == owner or not owner:
        return path[len(owner) :]
    if not path.startswith(f"{owner}."):
        raise UncountableGraphError(f"it runs {path!r}, which is no part of {owner!r}")
    return path[len(owner) + 1 :]


def _join(owner: str, path: str) -> str:
    """Return the path in the model of what `path` is as seen from the module at the path `owner`."""
    return f"{owner}.{path}" if owner and path else owner or path
