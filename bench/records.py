"""Records of measurements: where they are kept, and what each holds besides its figures."""

import shlex
import sys
from pathlib import Path

from fastentropy._utils.files import save_json
from fastentropy._utils.machine import describe_machine, source_commit

RESULTS = Path(__file__).parent / "results"


def save_record(name: str, device: str, **figures: object) -> None:
    """Write bench/results/NAME.json: the machine, the date, the version, the commit and the command, then the figures."""
    machine = describe_machine(device)
    record = {
        "machine": machine["device"],
        "date": machine["date"],
        "torch": machine["torch"],
        "commit": source_commit(),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    save_json(record | figures, RESULTS / f"{name}.json")
