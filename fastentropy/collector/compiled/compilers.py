"""Choose what compiles the code of a pass: the compiler of the user, with a backend that counts."""

import weakref
from collections.abc import Callable

from torch import nn

from fastentropy._compat import Backend, Compiler, CompilerWith, UncountableGraphError, backend_of, uncompiled
from fastentropy.collector.compiled.backend import CountingBackend
from fastentropy.sites.graphs import GraphReader

#: The backends that count in the code of a model. A later collector takes the same ones, so nothing is compiled again.
_BACKENDS: "weakref.WeakKeyDictionary[nn.Module, list[CountingBackend]]" = weakref.WeakKeyDictionary()

#: How many compilers a collector keeps. PyTorch makes another one for each call under `set_stance(force_backend=…)`.
_MOST_COMPILERS = 256


class CountingCompilers:
    """The compilers that count in the passes of a collector, each in place of a compiler of the user."""

    def __init__(self, model: nn.Module, note: Callable[[str], None]) -> None:
        """Begin without compilers.

        Args:
            model: the model that is counted.
            note: a function that is given a sentence about code that runs eagerly.
        """
        self._model, self._note = weakref.ref(uncompiled(model)), note
        self._compilers: dict[tuple[int, bool, object], tuple[Compiler, CompilerWith]] = {}

    def choose(self, reader: GraphReader, compiler: Compiler) -> Compiler:
        """Return what compiles a function in a pass: `compiler` with a backend that counts. None if the function runs as it is.

        Args:
            reader: what finds the sites of the graphs.
            compiler: the compiler of the user.
        """
        if isinstance(compiler, CompilerWith):
            compiler = compiler.original
        key = (id(compiler), reader.mask is None, reader.options)
        known = self._compilers.get(key)
        if known is not None and known[0] is compiler:
            return known[1]
        inner = backend_of(compiler)
        if inner is None:
            self._note("the stance of torch.compiler compiles nothing anew, so compiled code runs eagerly and is counted there")
            return None
        if len(self._compilers) == _MOST_COMPILERS:
            self._compilers.clear()
        known = self._compilers[key] = compiler, CompilerWith(compiler, self._backend(inner, reader), self._refused)
        return known[1]

    def _backend(self, inner: Backend, reader: GraphReader) -> CountingBackend:
        """Return a backend that counts, with the backend of the user behind it. Dynamo knows the code that it has compiled."""
        model = self._model()
        backends = [] if model is None else _BACKENDS.setdefault(model, [])
        for backend in backends:
            if backend.is_like(inner, reader):
                return backend
        backends.append(CountingBackend(inner, reader.options, reader.mask is not None))
        return backends[-1]

    def _refused(self, name: str, error: UncountableGraphError) -> None:
        """Note that the graph of some code is not counted, so that the code runs eagerly."""
        self._note(f"the compiled code of {name} runs eagerly and is counted there: {error}")
