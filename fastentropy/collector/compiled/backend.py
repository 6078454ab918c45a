"""The backend of torch.compile that counts: it changes each graph before the backend of the user compiles it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from fastentropy._compat import (
    Backend,
    UncountableGraphError,
    UnknownSiteError,
    for_counting,
    in_backward,
    is_compiling_here,
    own_graph,
    without_functions_of_modes,
    without_intercepting,
)
from fastentropy._utils.errors import one_line
from fastentropy.collector.compiled.instrumentation import add_counts
from fastentropy.collector.compiled.masks import MaskInput
from fastentropy.collector.counters import Counters
from fastentropy.sites.compiled_calls import current_caller
from fastentropy.sites.graphs import CountedAxes, GraphReader, GraphSites


class CountingBackend:
    """Let another backend compile graphs that also count, and add the counts of a run to the pass that runs the graph.

    It holds neither a collector nor a model: Dynamo keeps it as long as the code of the model, and models alike share it.
    """

    def __init__(self, inner: Backend, reader: GraphReader, changed: Callable[[], None]) -> None:
        """Begin without graphs.

        Args:
            inner: the backend of the user.
            reader: what finds the sites of the first graph.
            changed: a function that is called when `agrees` may return something else.
        """
        self._inner, self._changed = inner, changed
        self._options, self._has_mask = reader.options, reader.mask is not None
        self._axes: dict[str, CountedAxes] = {}
        self.__name__ = getattr(inner, "__name__", type(inner).__name__)

    def is_like(self, inner: Backend, reader: GraphReader) -> bool:
        """Return whether its graphs count what those of a backend for `reader` would."""
        is_same = self._options == reader.options and self._has_mask == (reader.mask is not None)
        return is_same and (self._inner is inner or self._inner == inner) and self.agrees(reader)

    def agrees(self, reader: GraphReader) -> bool:
        """Return whether the sites in its graphs are counted as `reader` needs it."""
        return reader.agrees(self._axes, self._has_mask)

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph of Dynamo. The function that is returned has the outputs of the graph as it was.

        Raises:
            UncountableGraphError: the graph cannot be counted.
        """
        if in_backward():
            raise UnknownSiteError("a backward pass would compile it, which does not know what is counted")
        reader: GraphReader | None = current_caller()
        counting = own_graph(graph_module)
        calls, sites, axes = ([], GraphSites((), None), {}) if reader is None else reader.read(counting)
        if not axes.keys() <= self._axes.keys():
            self._axes.update(axes)
            self._changed()
        if not calls:
            return _without_counts(self._inner(graph_module, inputs), sites)
        masks, values = add_counts(counting, calls)
        try:
            with for_counting(any(isinstance(x, Tensor) and x.is_cuda for x in inputs)):
                compiled = self._inner(counting, [*inputs, *values])
        except Exception as error:
            reason = (
                f"the backend {self.__name__!r} does not compile it with counts ({type(error).__name__}: {one_line(error)})"
            )
            raise UncountableGraphError(reason) from error
        return _with_counts(compiled, sites, masks)


def _without_counts(compiled: Callable[..., Any], sites: GraphSites) -> Callable[..., Any]:
    """Return a function that runs a compiled graph without activations."""

    def run(*args: Any) -> Any:
        reader: GraphReader | None = current_caller()
        if reader is not None and not is_compiling_here():
            reader.enter(sites)
        with without_intercepting(), without_functions_of_modes():
            return compiled(*args)

    return run


def _with_counts(compiled: Callable[..., Any], sites: GraphSites, masks: Sequence[MaskInput]) -> Callable[..., Any]:
    """Return a function that runs a compiled graph, whose last output is the counts of `sites`."""

    def run(*args: Any) -> Any:
        reader: GraphReader | None = None if is_compiling_here() else current_caller()  # DDP tries graphs without values
        named = None if reader is None else reader.enter(sites)
        mask = None if reader is None else reader.mask
        with without_intercepting(), without_functions_of_modes():
            *outputs, counts = compiled(*args, *[each.of(mask, args) for each in masks])
            counters: Counters | None = None if reader is None else reader.observed  # None in a paused pass
            if named is not None and counters is not None:
                counters.add_slots(named, counts)
        return outputs

    return run
