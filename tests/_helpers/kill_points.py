"""Kill a process at an exactly known moment."""

import itertools
import os
import signal
from pathlib import Path


def die_at(fatal_moment):
    """Kill this process at moment 0 or 1, before or after the first file replacement; 2 or 3 are the second one, and so on."""
    replace, moments = Path.replace, itertools.count()

    def die_if_fatal():
        if next(moments) == fatal_moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_and_count(path, target):
        die_if_fatal()
        replace(path, target)
        die_if_fatal()

    Path.replace = replace_and_count
