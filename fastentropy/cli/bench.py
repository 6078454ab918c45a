"""The command `fastentropy bench`: measure the kernels, the collector or fused networks."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastentropy.benchmarks.changes import format_changes
from fastentropy.benchmarks.plots import plot_record
from fastentropy.benchmarks.records import Record
from fastentropy.benchmarks.runner import BENCHMARKS, DTYPES, check_benchmark, files_to_write, parse_sizes, run_benchmark
from fastentropy.benchmarks.tables import format_case
from fastentropy.cli.options import AsJson, chosen_device, one_line_errors, option_of


def bench(
    benchmark: Annotated[str, typer.Argument(help=f"The benchmark to run: {', '.join(BENCHMARKS)}.")] = "kernels",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if available]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Type of weights and inputs: {', '.join(DTYPES)}. [default: set by the benchmark]")
    ] = None,
    sizes: Annotated[
        str,
        typer.Option(
            help="Sizes to measure, such as 64k,1M,16M (k = 1024): values per tensor for kernels, else batch sizes. "
            "[default: set by the benchmark]"
        ),
    ] = "",
    rounds: Annotated[
        int | None, typer.Option(min=2, help="Samples of each operation. [default: set by the benchmark, within a time limit]")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="File to write the record to. [default: runs/bench-BENCHMARK-DATE.json]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="File to draw the plot to: .png, .svg or .pdf. [default: next to the record]")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Older record to compare with: show what changed by more than noise. [default: none]")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Time launch configurations of the state kernels on a GPU instead. [default: off]")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the kernels, the collecting of statistics, or fused networks, each next to its baselines.

    Prints a table for each case, and writes a record (JSON) and a plot.
    """
    with one_line_errors():
        check_benchmark(benchmark, dtype)
        chosen, numbers = chosen_device(device), parse_sizes(sizes) if sizes else []
        if sweep:
            given = {"dtype": dtype, "sizes": sizes, "rounds": rounds, "record": record, "plot": plot, "compare": compare}
            _sweep_launches(benchmark, chosen, {**given, "json": as_json})
            return
        if compare and as_json:
            raise ValueError("--json prints the record without the table of --compare; leave out one of them")
        old = Record.load(compare) if compare else None
        if old and old.benchmark != benchmark:
            raise ValueError(
                f"{compare} is a record of {old.benchmark!r}, not of {benchmark!r}; name one of the same benchmark"
            )
        path, picture = files_to_write(benchmark, record, plot)
        command = shlex.join(["fastentropy", *sys.argv[1:]])
        try:
            measured = run_benchmark(
                benchmark, device=chosen, dtype=dtype, sizes=numbers, rounds=rounds, command=command, path=path,
                show=lambda case: None if as_json else typer.echo(f"{format_case(case)}\n"),
            )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo(f"Interrupted. The cases measured before, if any, are in {path}", err=True)
            raise typer.Exit(130) from None
        plot_record(measured, picture)
        if as_json:
            typer.echo(json.dumps(measured.to_dict(), indent=2))
            return
        if old:
            typer.echo(f"{format_changes(old, measured)}\n")
        typer.echo(f"record   {path}\nplot     {picture}")


def _sweep_launches(benchmark: str, device: torch.device, options: Mapping[str, object]) -> None:
    if given := [option_of(name) for name, value in options.items() if value]:
        raise ValueError(f"--sweep measures fixed cases and writes no files; leave out {', '.join(given)}")
    if benchmark != "kernels" or device.type != "cuda":
        raise ValueError(f"--sweep tries launch configurations of the state kernels on a GPU, not of {benchmark!r} on {device}")
    from fastentropy.benchmarks.launch_sweep import sweep_launches  # imports Triton, which some systems lack

    typer.echo(f"# {torch.cuda.get_device_name(device)}: the best table launch_triton.LAUNCHES for this GPU")
    for line in sweep_launches(device):
        typer.echo(line)
