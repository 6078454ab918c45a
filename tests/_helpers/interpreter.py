"""Triton's interpreter, without the work that it repeats at every call of a function inside of a kernel."""

import inspect

from triton import language as tl
from triton.runtime import interpreter


def patch_once_a_launch(monkeypatch):
    """Let the interpreter replace the functions of `triton.language` once for each launch.

    It replaces them again at every call of a jit function in a kernel, and looks through all of the language for that, which
    takes a third of the time of a kernel and changes nothing: they are restored only when the launch is over.
    """
    patch, patched = interpreter._patch_lang, set()

    def patch_new(fn):
        modules = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)}
        if modules <= patched:
            return None  # the call of a function inside of a kernel, which needs nothing more
        scope = patch(fn)
        patched.update(modules)
        restore = scope.restore

        def restored():
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_new)
