"""A run of a benchmark.

A case is a group of operations that are timed side by side. The cases are measured one after the other, and the measurements of
a case are on disk before the next case begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fastentropy._utils.optional import install_command
from fastentropy.benchmarks import collecting, fusing, kernels
from fastentropy.benchmarks.measurements import Case, Measurement, measure
from fastentropy.benchmarks.records import Record
from fastentropy.reporting.plots import figure_format

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "k": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark: its cases, and how long each case is measured.

    Attributes:
        cases: a function that yields the cases for a device, dtypes and sizes. If the sizes are empty, it uses its own.
        dtypes: the names of the default dtypes, by type of device.
        rounds: the default number of rounds. Each round takes one sample of every operation of a case.
        budget_seconds: the time after which no further round of a case begins, except a minimum number of rounds.
        needs: the packages that the benchmark needs in addition to the dependencies of fastentropy.
    """

    cases: Callable[[torch.device, Sequence[torch.dtype], Sequence[int]], Iterator[Case]]
    dtypes: dict[str, tuple[str, ...]]
    rounds: int
    budget_seconds: float
    needs: tuple[str, ...] = ()


BENCHMARKS = {
    "kernels": Benchmark(kernels.kernel_cases, dict.fromkeys(("cpu", "cuda"), ("float32", "bfloat16")), 31, 2),
    "collect": Benchmark(
        collecting.collect_cases, {"cpu": ("float32",), "cuda": ("bfloat16",)}, 24, 60, ("torchvision", "transformers")
    ),
    "fuse": Benchmark(fusing.fuse_cases, dict.fromkeys(("cpu", "cuda"), ("float32",)), 24, 20, ("torchvision",)),
}


def run_benchmark(
    name: str,
    *,
    device: torch.device,
    dtype: str | None,
    sizes: Sequence[int],
    rounds: int | None,
    command: str,
    path: Path,
    show: Callable[[list[Measurement]], None],
) -> Record:
    """Measure every case of a benchmark.

    The record is saved after each case. If an error or the user ends the run, the file holds the cases finished so far and
    is marked as incomplete.

    Args:
        name: a key of `BENCHMARKS`.
        device: the device to measure.
        dtype: a key of `DTYPES`, or None for the default dtypes of the benchmark.
        sizes: the numbers of values of a tensor ("kernels") or the batch sizes. If empty, the default sizes of the benchmark.
        rounds: the number of samples of each operation, without a time limit. None takes the benchmark's number of rounds and
            its time limit.
        command: the command line of the run, for the record.
        path: the JSON file to write the record to.
        show: a function that is called with the measurements of each case.

    Returns:
        The complete record.

    Raises:
        ValueError: a case does not fit into memory.
    """
    benchmark = BENCHMARKS[name]
    dtypes = [DTYPES[each] for each in ([dtype] if dtype else benchmark.dtypes[device.type])]
    record = Record.begin(name, str(device), command)
    with _out_of_memory_is_bad_input(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for case in benchmark.cases(device, dtypes, sizes):
            budget = float("inf") if rounds else benchmark.budget_seconds
            measurements = measure(case, rounds=rounds or benchmark.rounds, budget_seconds=budget)
            del case  # free its tensors before the next case is made
            torch.compiler.reset()  # PyTorch limits how often the same code is compiled, counted over all cases
            gc.collect()
            record = record.with_more(measurements)
            record.save(path)
            show(measurements)
    record = dataclasses.replace(record, complete=True)
    record.save(path)
    return record


@contextlib.contextmanager
def _out_of_memory_is_bad_input() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ValueError("a tensor of the next case does not fit into memory; give smaller --sizes") from error
        raise


def files_to_write(name: str, record: Path | None, picture: Path | None) -> tuple[Path, Path]:
    """Return the paths of the record and the plot, after a check that they can be written.

    Args:
        name: the name of the benchmark.
        record: the file of the record, with the suffix .json. None chooses a file in the folder runs, which is created.
        picture: the file of the plot, with the suffix .png, .svg or .pdf. None chooses a .png file next to the record.

    Returns:
        The path of the record and the path of the plot.

    Raises:
        ValueError: a path has another suffix, is a folder, or lies in a folder that does not exist or cannot be written to.
    """
    path = record or Path("runs") / f"bench-{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    if path.suffix != ".json":
        raise ValueError(f"{path} cannot be written; name a file that ends in .json")
    beside = picture or path.with_suffix(".png")
    figure_format(beside)
    for each in filter(None, (record, picture)):
        if each.is_dir() or not each.parent.is_dir() or not os.access(each.parent, os.W_OK):
            raise ValueError(f"{each} cannot be written; name a file in a folder that exists")
    if record is None:
        path.parent.mkdir(exist_ok=True)
    return path, beside


def check_benchmark(name: str, dtype: str | None) -> None:
    """Check that a benchmark can run.

    Args:
        name: the name of the benchmark.
        dtype: the name of a dtype, or None for the default dtypes of the benchmark.

    Raises:
        ValueError: the benchmark or the dtype is unknown, or a package that the benchmark needs is missing.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; name one of {', '.join(BENCHMARKS)}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    missing = [package for package in BENCHMARKS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"`fastentropy bench {name}` needs {' and '.join(missing)}: {install_command('bench')}")


def parse_sizes(text: str) -> list[int]:
    """Parse a list of sizes.

    Args:
        text: positive integers, separated by commas, such as "64k,1M,16M". The units k, M and G are powers of 1,024.

    Returns:
        The sizes in ascending order, without repetitions.

    Raises:
        ValueError: the text has another form.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]*)([kMG]?)", part.strip())
        if match is None:
            raise ValueError(f"--sizes {text}: {part!r} is no size; give numbers such as 16 or 64k,1M,16M")
        sizes.append(int(match[1]) * _UNITS[match[2]])
    return sorted(set(sizes))
