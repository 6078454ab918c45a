"""Remember what compiled the functions that run in checkpoints, for when backward passes recompute them."""

import weakref
from collections.abc import Callable

from fastentropy._compat import Compiler, running_checkpoint


class CheckpointedCompilers:
    """What was chosen in place of the compilers of the user, by the checkpoint in which they were called.

    A recomputation must save the same tensors as the forward, so it is compiled as the forward was. If that ran as it is, so
    does the recomputation.
    """

    def __init__(self, forgotten: Callable[[], None]) -> None:
        """Begin without checkpoints. `forgotten` is called when a checkpoint is gone."""
        self._forgotten = forgotten
        self._chosen: weakref.WeakKeyDictionary[object, dict[int, tuple[Compiler, Compiler]]] = weakref.WeakKeyDictionary()

    def __bool__(self) -> bool:
        """Return whether there is a checkpoint that may be recomputed."""
        return bool(list(self._chosen))

    def note(self, compiler: Compiler, chosen: Compiler) -> None:
        """Remember what was chosen in place of a compiler, if this thread runs a checkpoint."""
        checkpoint = running_checkpoint()
        if checkpoint is None:
            return
        if checkpoint not in self._chosen:
            self._chosen[checkpoint] = {}
            weakref.finalize(checkpoint, self._forgotten).atexit = False
        self._chosen[checkpoint][id(compiler)] = compiler, chosen

    def chosen(self, compiler: Compiler) -> tuple[bool, Compiler]:
        """Return whether this thread recomputes a checkpoint in which a compiler was called, and what was chosen for it there.

        A checkpoint inside of another one is recomputed as a new one, so what was chosen last for the compiler is taken for it.
        """
        checkpoint = running_checkpoint()
        if checkpoint is None:
            return False, None
        known = (self._chosen.get(checkpoint), *reversed(list(self._chosen.values())))
        found = (each[id(compiler)] for each in known if each is not None and id(compiler) in each)
        return next(((True, chosen) for of, chosen in found if of is compiler), (False, None))
