"""What every record of a measurement holds besides its figures, and where records are kept."""

import datetime
import shlex
import sys
from pathlib import Path

import torch

from fastentropy.files import save_json

RESULTS = Path(__file__).parent / "results"


def save_record(name: str, device: str, **figures: object) -> None:
    """Write bench/results/NAME.json: the machine and its threads, the date, the version, the command, then the figures."""
    record = {
        "machine": machine(device),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    save_json(record | figures, RESULTS / f"{name}.json")


def machine(device: str) -> str:
    """Name the processor, or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"
