"""Measure on a GPU that is there for minutes: what only a GPU can say, the most important first.

python bench/record_gpu.py --minutes 10 [--output runs/gpu] [--data CIFAR10] [--calibrate MODEL TEXTS] [--device cuda]

Each step is a command of its own, and ends with its share of the time; what it leaves goes to the later steps. Records are
written as they come, so a run that is cut off keeps what it has. The folder holds a record of each step, what the commands
printed (steps.log), and summary.json, which says how each step ended. A second run of the command goes on with the steps that
have not finished.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastentropy._utils.files import save_json
from fastentropy._utils.machine import describe_machine, source_commit

ROOT = Path(__file__).parent.parent
#: How many seconds a command has to end after it was interrupted.
GRACE_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, and its share of the time.

    Attributes:
        name: what the step measures.
        share: its part of the time, relative to those of the other steps.
        command: the command line.
        missing: what the user has to give so that the step can run; empty if nothing.
        record: a file of the command's that is copied to NAME.json once it has ended; None if the command writes its record.
    """

    name: str
    share: float
    command: Sequence[str]
    missing: str = ""
    record: Path | None = None


def steps(output: Path, device: str, data: str | None, calibrated: Sequence[str]) -> list[Step]:
    """Return all steps, the most important first.

    Args:
        output: the folder of the records.
        device: the device, such as "cuda".
        data: the folder with CIFAR-10, or None.
        calibrated: the folder of a language model and one of texts, or nothing.
    """
    ours, on = [sys.executable, "-m", "fastentropy"], ["--device", device]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    networks = [sys.executable, "bench/record_networks.py", *on, "--name", str(output / "networks")]
    model, texts = calibrated or ("", "")
    calibrate = [*ours, "calibrate", model, "--data", texts, *on, "--output", str(output / "runs" / "calibrate")]

    def bench(name: str, share: float) -> Step:
        return Step(name, share, [*ours, "bench", name, *on, "--record", str(output / f"{name}.json")])

    def prune(name: str, share: float, options: Sequence[str], missing: str = "") -> Step:
        folder = output / "runs" / name
        history = folder / "history.json"
        begin = [*options, *on, "--output", str(folder)]
        return Step(
            name, share, [*ours, "prune", *(["--resume", str(folder)] if history.exists() else begin)], missing, history
        )

    return [
        Step("tests of the kernels", 15, [*tests, "tests/kernels"]),
        bench("kernels", 20),
        bench("collect", 20),
        Step("whole networks", 15, networks),
        Step("other tests", 5, [*tests, "tests", "--ignore=tests/kernels"]),
        prune("digits", 5, ["digits"]),
        bench("fuse", 10),
        Step(
            *("calibrate", 5, calibrate, "" if calibrated else "--calibrate MODEL TEXTS"),
            record=output / "runs" / "calibrate" / "summary.json",
        ),
        Step("launch sweep", 5, [*ours, "bench", "kernels", *on, "--sweep"], "" if device.startswith("cuda") else "a GPU"),
        prune("cifar10", 20, ["cifar10", "--model", "resnet18", "--data", str(data)], "" if data else "--data CIFAR10"),
    ]


def main() -> None:
    """Run the steps, and print how each ended and what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="how long all steps may take together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="the folder of the records [default: runs/gpu]")
    parser.add_argument("--data", help="the folder with the parquet files of CIFAR-10")
    parser.add_argument(
        "--calibrate", nargs=2, default=(), metavar=("MODEL", "TEXTS"), help="folders, for fastentropy calibrate"
    )
    options = parser.parse_args()
    # A shell lets its commands in the background ignore interrupts, and so would the commands of the steps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    data = options.data and str(Path(options.data).resolve())
    calibrated = [str(Path(each).resolve()) for each in options.calibrate]
    summary = run_steps(steps(output, options.device, data, calibrated), 60 * options.minutes, output, options.device)
    open_steps = [name for name, step in summary["steps"].items() if step["ended"] != "finished"]
    print(f"Missing: {', '.join(open_steps) or 'nothing'}. The records are in {output}")


def run_steps(planned: Sequence[Step], seconds: float, output: Path, device: str) -> dict[str, Any]:
    """Run each step that was not finished before, and return the summary.

    Args:
        planned: the steps.
        seconds: the time for all of them. What a step leaves goes to the later ones.
        output: the folder for steps.log and summary.json, which is written after each step.
        device: the device, for the summary.
    """
    path, end = output / "summary.json", time.monotonic() + seconds
    ended = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else {}
    summary = {"machine": describe_machine(device), "commit": source_commit(), "steps": ended}
    left = [step for step in planned if ended.get(step.name, {}).get("ended") != "finished"]
    for place, step in enumerate(left):
        share = step.share / sum(each.share for each in left[place:] if not each.missing or each is step)
        ended[step.name] = run_step(step, share * (end - time.monotonic()), output / "steps.log")
        if step.record is not None and step.record.exists():
            shutil.copy(step.record, output / f"{step.name}.json")
        print(f"{step.name}: {ended[step.name]['ended']}, {ended[step.name]['seconds']:.0f} s", flush=True)
        save_json(summary, path)
    return summary


def run_step(step: Step, seconds: float, log: Path) -> dict[str, Any]:
    """Run the command of a step for so many seconds at most, and return how it ended.

    Args:
        step: the step.
        seconds: the time after which its command is interrupted.
        log: the file to which the output of the command is appended.
    """
    start = time.monotonic()
    if step.missing:
        return {"ended": f"left out: it needs {step.missing}", "seconds": 0.0}
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(step.command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(max(0.0, seconds))
            how = "finished" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            how = "cut off"
        finally:
            end_group(process)
    printed = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    last = printed[-1] if printed else ""
    return {"ended": how, "seconds": round(time.monotonic() - start, 1), "last line": last, "command": shlex.join(step.command)}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and all that it has started, so that it can save what it has; kill what is left after a while."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


if __name__ == "__main__":
    main()
