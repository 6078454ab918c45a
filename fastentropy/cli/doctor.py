"""The command `fastentropy doctor`: check whether fastentropy can run on this machine, and with which kernels."""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastentropy._utils.text import plural
from fastentropy.cli.options import AsJson
from fastentropy_kernels import available_implementations, count_states


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: what was checked, such as "torch" or "cuda:0 kernels: triton".
        text: the result, such as a version or the reason of a failure.
        ok: whether fastentropy can run with this result. It can run on this machine if all findings are ok.
    """

    name: str
    text: str
    ok: bool = True


def doctor(as_json: AsJson = False) -> None:
    """Check that fastentropy can run on this machine.

    Shows the versions, the devices, and the kernels that run on each device. The exit status is 1 if a check fails.
    """
    findings = examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for finding in findings:
            table.add_row("ok" if finding.ok else "NO", finding.name, finding.text)
        Console().print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Check Python, the libraries, the devices, and the kernels of each device. Return a finding for each."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    version = platform.python_version()
    return [
        Finding(
            "python",
            version if sys.version_info >= (3, 10) else f"{version}: 3.10 or newer is needed",
            sys.version_info >= (3, 10),
        ),
        *map(_library, ("torch", "numpy", "safetensors", "numba", "executing", "scikit-learn", "matplotlib", "jinja2")),
        _library("triton", needed=False),
        *(finding for device in devices for finding in _device(device)),
    ]


def _library(name: str, needed: bool = True) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed; pip install {name}", not needed)


def _device(device: torch.device) -> Iterator[Finding]:
    threads = plural(torch.get_num_threads(), "thread")
    yield Finding(str(device), threads if device.type == "cpu" else torch.cuda.get_device_name(device))
    for implementation, reason in available_implementations(device).items():
        yield _kernel(implementation, reason, device)


def _kernel(implementation: str, reason: str, device: torch.device) -> Finding:
    """Run the kernel that counts off, zero and on values on a small tensor, and check its counts.

    Args:
        implementation: the implementation to run, one of the keys that `available_implementations` returns.
        reason: why the implementation cannot run on the device, or "" if it can.
        device: the device to run on.
    """
    name = f"{device} kernels: {implementation}"
    if reason:
        return Finding(name, f"no: {reason}")
    counts = torch.zeros(1, 3, dtype=torch.int64, device=device)
    try:
        count_states(torch.tensor([[-1.0], [0.0], [2.0], [3.0]], device=device), counts, impl=implementation)
    except Exception as error:
        return Finding(name, f"failed: {error}", ok=False)
    right = counts.tolist() == [[1, 1, 2]]
    return Finding(name, "yes" if right else f"wrong counts {counts.tolist()}", right)
