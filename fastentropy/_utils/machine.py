"""Describe the machine and the commit with which a measurement was made."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from fastentropy._utils.text import plural

#: Git patterns of the sources outside this package that affect a measurement. Records of measurements and documentation pages
#: are not among them, because writing a record must not mark the commit as changed.
OTHER_SOURCES = (":(top)kernels", ":(top)bench/*.py")


def describe_machine(device: str) -> dict[str, str]:
    """Describe the machine, for the record of a measurement.

    Args:
        device: a device of PyTorch, such as "cpu" or "cuda:0".

    Returns:
        "device": the name of the GPU, or the name of the processor and PyTorch's number of threads; "torch": the version of
        PyTorch; "date": today, as YYYY-MM-DD.
    """
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {plural(torch.get_num_threads(), 'thread')}"
    return {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def source_commit() -> str | None:
    """Return the git commit of the running sources, as 12 hexadecimal digits.

    A "+" follows the digits if the sources have changes that are not committed. The result is None if the package does not run
    from a git clone.
    """
    folder = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        """Return the output of a git command that runs in the folder of the package."""
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, text=True).stdout.strip()

    try:
        if not git("ls-files", str(Path(__file__))):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".", *OTHER_SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """Return the name of the CPU; on systems without /proc/cpuinfo, the name that Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
