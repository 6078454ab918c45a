"""Choose what compiles the code of a pass: the compiler of the user, with a backend that counts."""

import weakref
from collections.abc import Callable

from fastentropy._compat import Backend, Compiler, CompilerWith, UncountableGraphError, backend_of
from fastentropy.collector.compiled.backend import CountingBackend
from fastentropy.sites.graphs import GraphReader
from fastentropy.sites.kept_compilers import KeptCompilers


class _Backends:
    """The backends that count. Dynamo keeps each as long as code that it has compiled, so nothing is compiled again later.

    Attributes:
        version: another number each time that a backend may fit other models than before.
    """

    def __init__(self) -> None:
        """Begin without backends."""
        self.version = 0
        self._backends: list[weakref.ref[CountingBackend]] = []

    def find(self, inner: Backend, reader: GraphReader) -> CountingBackend:
        """Return a backend whose graphs count what `reader` needs, with the backend of the user behind it."""
        self._backends = [reference for reference in self._backends if reference() is not None]
        for reference in self._backends:
            backend = reference()
            if backend is not None and backend.is_like(inner, reader):
                return backend
        backend = CountingBackend(inner, reader, self._changed)
        self._backends.append(weakref.ref(backend))
        return backend

    def _changed(self) -> None:
        """Note that a backend has compiled sites that it had not compiled before."""
        self.version += 1


_BACKENDS = _Backends()


class CountingCompilers:
    """The compilers that count in the passes of a collector, each in place of a compiler of the user."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """Begin without compilers. `note` is given a sentence about code that runs eagerly."""
        self._note = note
        self._compilers, self._version = KeptCompilers(self._refused), (0, 0)

    def choose(self, reader: GraphReader, compiler: Compiler) -> Compiler:
        """Return what compiles a function in a pass: `compiler` with a backend that counts. None if the function runs as it is.

        Args:
            reader: what finds the sites of the graphs.
            compiler: the compiler of the user.
        """
        version = _BACKENDS.version, reader.known_sites
        if self._version != version:
            self._version = version
            self._compilers.drop(lambda backend: not (isinstance(backend, CountingBackend) and backend.agrees(reader)))
        original = compiler.original if isinstance(compiler, CompilerWith) else compiler
        options = reader.mask is None, reader.options
        known = self._compilers.known(original, options)
        if known is not None:
            return known
        inner = backend_of(original)
        if inner is None:
            self._note("the stance of torch.compiler compiles nothing anew, so compiled code runs eagerly and is counted there")
            return None
        return self._compilers.keep(original, _BACKENDS.find(inner, reader), options)

    def _refused(self, name: str, error: UncountableGraphError) -> None:
        """Note that the graph of some code is not counted, so that the code runs eagerly."""
        self._note(f"the compiled code of {name} runs eagerly and is counted there: {error}")
