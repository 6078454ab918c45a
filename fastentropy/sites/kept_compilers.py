"""Keep compilers that hand their graphs to other backends, each in place of a compiler of the user."""

import weakref
from collections.abc import Callable

from fastentropy._compat import Backend, Compiler, CompilerWith, Refusals, UncountableGraphError

#: How many are kept. PyTorch makes another compiler of the user for each call under `set_stance(force_backend=…)`.
_MOST = 256


class KeptCompilers:
    """Compilers that hand their graphs to other backends, the latest ones, and what these backends have refused."""

    def __init__(self, refused: Callable[[str, UncountableGraphError], None]) -> None:
        """Begin without compilers. `refused` is told the name of code whose graph is refused, and why."""
        self._refused = refused
        self._compilers: dict[tuple[int, object], tuple[Compiler, CompilerWith]] = {}
        self._refusals: weakref.WeakKeyDictionary[Backend, Refusals] = weakref.WeakKeyDictionary()

    def drop(self, is_wrong: Callable[[Backend], bool]) -> None:
        """Forget the compilers whose backend is wrong."""
        for key, (_, chosen) in list(self._compilers.items()):
            if is_wrong(chosen.backend):
                self._compilers.pop(key, None)

    def known(self, compiler: Compiler, options: object = None) -> CompilerWith | None:
        """Return what is kept in place of a compiler of the user; None if nothing is."""
        of, chosen = self._compilers.get((id(compiler), options), (None, None))
        return chosen if of is compiler else None

    def keep(self, compiler: Compiler, backend: Backend, options: object = None) -> CompilerWith:
        """Make a compiler that hands its graphs to `backend`, and keep it.

        Args:
            compiler: the compiler of the user in whose place it is.
            backend: the backend.
            options: what else `known` asks for, hashable.
        """
        refusals = self._refusals.setdefault(backend, Refusals(self._refused))
        chosen = CompilerWith(compiler, backend, refusals)
        self._compilers.pop((id(compiler), options), None)
        self._compilers[id(compiler), options] = compiler, chosen
        if len(self._compilers) > _MOST:
            self._compilers.pop(next(iter(self._compilers)), None)
        return chosen
