"""Write records of measurements to bench/results. A record also names the machine and the command that measured it."""

import shlex
import sys
from pathlib import Path

from fastentropy._utils.files import save_json
from fastentropy._utils.machine import describe_machine, source_commit

RESULTS = Path(__file__).parent / "results"


def save_record(name: str, device: str, **figures: object) -> None:
    """Write the record bench/results/NAME.json.

    It holds the machine, the date, the version of PyTorch, the commit and the command line, and then the figures.

    Args:
        name: the name of the record, without a suffix.
        device: the device that was measured, such as "cpu".
        figures: what was measured, as values that JSON can represent.
    """
    machine = describe_machine(device)
    record = {
        "machine": machine["device"],
        "date": machine["date"],
        "torch": machine["torch"],
        "commit": source_commit(),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    save_json(record | figures, RESULTS / f"{name}.json")
