"""Kill a process at an exactly known moment."""

import itertools
import os
import signal
from pathlib import Path


def die_at(fatal_moment):
    """Make this process kill itself before or after one of its file replacements (`Path.replace`).

    Args:
        fatal_moment: 0 is before and 1 is after the first replacement, 2 is before and 3 is after the second one, and so on.
    """
    replace, moments = Path.replace, itertools.count()

    def die_if_fatal():
        if next(moments) == fatal_moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_and_count(path, target):
        die_if_fatal()
        replace(path, target)
        die_if_fatal()

    Path.replace = replace_and_count
