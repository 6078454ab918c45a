"""The machine and the commit of a measurement."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch

from fastentropy._utils.text import plural

#: Sources outside this package, as git patterns. Records and pages are none: writing them must not mark the commit as changed.
OTHER_SOURCES = (":(top)kernels", ":(top)bench/*.py")


def describe_machine(device: str) -> dict[str, str]:
    """Return the name of the processor with its threads, or of the GPU, the version of PyTorch, and the date, for a record."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {plural(torch.get_num_threads(), 'thread')}"
    return {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def source_commit() -> str | None:
    """Return the commit of the running sources, with a "+" if they differ from it, or None outside a clone."""
    folder = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, text=True).stdout.strip()

    try:
        if not git("ls-files", str(Path(__file__))):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".", *OTHER_SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
