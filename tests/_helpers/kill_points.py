"""How a process is killed at a moment that is not left to chance."""

import itertools
import os
import signal
from pathlib import Path


def die_at(fatal_moment):
    """Die at moment 0 or 1, before or after a file is put in its place, at 2 or 3 with the second file, and so on."""
    replace, moments = Path.replace, itertools.count()

    def die_if_it_is_time():
        if next(moments) == fatal_moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_between_moments(path, target):
        die_if_it_is_time()
        replace(path, target)
        die_if_it_is_time()

    Path.replace = replace_between_moments
