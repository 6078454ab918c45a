"""What a figure was measured on."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch

#: Of a clone, besides this package, as git names them: a record that is written or a page must not change the commit.
OTHER_SOURCES = (":(top)kernels", ":(top)bench/*.py")


def describe_machine(device: str) -> dict[str, str]:
    """The name of the processor or the GPU, the version of PyTorch and the date, as records of runs hold them."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def source_commit() -> str | None:
    """The commit of the sources that run, with a + where one of them differs from it; None outside of a clone."""
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
