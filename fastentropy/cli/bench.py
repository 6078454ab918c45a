"""The command `fastentropy bench`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastentropy.benchmarks.changes import format_changes
from fastentropy.benchmarks.plots import plot_record
from fastentropy.benchmarks.records import Record
from fastentropy.benchmarks.runner import BENCHMARKS, check_benchmark, files_to_write, parse_sizes, run_benchmark
from fastentropy.benchmarks.tables import format_case
from fastentropy.cli.options import chosen_device, one_line_errors


def bench(
    benchmark: Annotated[str, typer.Argument(help=f"What to measure: {', '.join(BENCHMARKS)}.")] = "kernels",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the values: one of float32, bfloat16, float16.")] = None,
    sizes: Annotated[str, typer.Option(help="kernels: values of a tensor, as 64k,1M,16M; else rows of a batch.")] = "",
    rounds: Annotated[int | None, typer.Option(min=2, help="Samples of each. [default: what fits in a while]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="The record. [default: in the folder runs]")] = None,
    plot: Annotated[Path | None, typer.Option(help="The picture, .png, .svg or .pdf. [default: beside the record]")] = None,
    compare: Annotated[Path | None, typer.Option(help="An older record: what has changed since, and the noise.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Try launch configurations of the kernels on a GPU.")] = False,
) -> None:
    """Measure the kernels, collecting or fusing beside what one would use instead; draw a picture of it."""
    with one_line_errors():
        check_benchmark(benchmark, dtype)
        chosen, numbers = chosen_device(device), parse_sizes(sizes) if sizes else []
        if sweep:
            options = {"dtype": dtype, "sizes": sizes, "rounds": rounds, "json": json_file, "plot": plot, "compare": compare}
            _sweep(benchmark, chosen, [f"--{name}" for name, value in options.items() if value])
            return
        old = Record.load(compare) if compare else None
        if old and old.benchmark != benchmark:
            raise ValueError(f"{compare} is a record of {old.benchmark!r}, not of {benchmark!r}; compare the same benchmark")
        record_path, picture = files_to_write(benchmark, json_file, plot)
        command = shlex.join(["fastentropy", *sys.argv[1:]])
        try:
            record = run_benchmark(
                benchmark, device=chosen, dtype=dtype, sizes=numbers, rounds=rounds, command=command, path=record_path,
                show=lambda case: typer.echo(f"{format_case(case)}\n"),
            )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo(f"Interrupted. What was measured before, if anything, is in {record_path}", err=True)
            raise typer.Exit(130) from None
        plot_record(record, picture)
        if old:
            typer.echo(f"{format_changes(old, record)}\n")
        typer.echo(f"record   {record_path}\nplot     {picture}")


def _sweep(benchmark: str, device: torch.device, options: Sequence[str]) -> None:
    if options:
        raise ValueError(f"--sweep has cases of its own and prints a table; leave out {', '.join(options)}")
    if benchmark != "kernels" or device.type != "cuda":
        raise ValueError(f"--sweep tries launch configurations of the state kernels on a GPU, not of {benchmark!r} on {device}")
    from fastentropy.benchmarks.launch_sweep import sweep_launches  # needs Triton, which is not there on every system

    typer.echo(f"# {torch.cuda.get_device_name(device)}: the table states_triton.LAUNCHES that is best here")
    for line in sweep_launches(device):
        typer.echo(line)
