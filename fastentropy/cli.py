"""The command line: arguments in, runs and tables out. Bad input ends with one line and exit status 2."""

import contextlib
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastentropy.benchmarks.comparison import format_changes
from fastentropy.benchmarks.plots import plot_record
from fastentropy.benchmarks.records import Record
from fastentropy.benchmarks.runs import BENCHMARKS, check_benchmark, files_to_write, parse_sizes, run_benchmark
from fastentropy.benchmarks.tables import format_case
from fastentropy.calibration.pretrained import DTYPES
from fastentropy.calibration.ranks import Ranks, SaidByAnother, joined
from fastentropy.calibration.runs import Options, run_calibration
from fastentropy.comparison import format_comparison, label_runs, plot_comparison, write_comparison
from fastentropy.console import CalibrationDisplay, ProgressDisplay, print_calibration, print_history
from fastentropy.criteria import CRITERIA
from fastentropy.doctor import examine
from fastentropy.histories import check_history
from fastentropy.recipes import RECIPES, load_recipe
from fastentropy.report import plot_summary, write_report
from fastentropy.runs import Run, Settings, create_run, open_run, read_history

app = typer.Typer(
    help="Find the layers that a network does not need and take them out so that it really runs faster.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    """Keeps `fastentropy` a group of commands."""


@app.command()
def prune(
    recipe: Annotated[
        str | None, typer.Argument(help=f"What to train and prune: {', '.join(RECIPES)}. [default: digits]")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="Stop where validation accuracy falls by more. [default: 0.005]")
    ] = None,
    max_removed: Annotated[int | None, typer.Option(min=0, help="Remove at most so many. [default: no limit]")] = None,
    per_step: Annotated[int | None, typer.Option(min=1, help="Activations removed in one step. [default: 1]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Same seed, same removals. [default: 0]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each schedule. [default: the recipe's]")] = None,
    criterion: Annotated[str | None, typer.Option(help=f"What goes first: {', '.join(CRITERIA)}. [default: entropy]")] = None,
    zeros_together: Annotated[
        bool, typer.Option("--zeros-together", help="Remove all with an entropy of 0 at once, as published.")
    ] = False,
    target_speedup: Annotated[
        float | None, typer.Option(min=0, help="With entropy-per-latency: stop when so many times as fast.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, help="With entropy-per-latency: stop at so many milliseconds per call.")
    ] = None,
    collapse: Annotated[
        str | None, typer.Option(help="project: approximate linearised convolutions by one where that is faster.")
    ] = None,
    protect: Annotated[list[str] | None, typer.Option(help="An activation that stays; may be given again.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of the recipe's networks. [default: the recipe's]")] = None,
    data: Annotated[str | None, typer.Option(help="The folder of the recipe's data, or a name to download it by.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Train with torch.compile.")] = False,
    output: Annotated[Path | None, typer.Option(help="The run folder. [default: runs/RECIPE-DATE]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if there is one]")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run; it keeps its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the history as JSON instead of a table.")] = False,
) -> None:
    """Train a network, remove its needless activations one by one, fuse what became linear, and report."""
    options = {
        "max_drop": max_drop,
        "max_removed": max_removed,
        "per_step": per_step,
        "seed": seed,
        "epochs": epochs,
        "criterion": criterion,
        "zeros_together": zeros_together or None,
        "target_speedup": target_speedup,
        "max_latency_ms": max_latency_ms,
        "collapse": collapse,
        "protect": protect or None,
        "model": model,
        "data": data,
        "compile": compile or None,
    }
    errors = Console(stderr=True)
    with _one_line_errors():
        if resume is not None:
            run = _resumed(resume, recipe, {**options, "output": output, "device": device})
        else:
            run = _created(recipe or "digits", options, output, device)
    try:
        with _one_line_errors(), ProgressDisplay(errors) as display:
            history = run.execute(display)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. What is finished is on disk; go on with: fastentropy prune --resume {run.folder}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(history, indent=2))
    else:
        print_history(history, run.folder, Console())


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A folder of a model of transformers, or its name on the Hugging Face hub.")],
    data: Annotated[
        str, typer.Option(help="Texts (.txt, .jsonl, .parquet) or images: a file, a folder, a pattern, or a name for datasets.")
    ],
    column: Annotated[str | None, typer.Option(help="Where documents lie in tables. [default: text, image or img]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row. [default: 512 or the model's limit]")] = None,
    packing: Annotated[bool, typer.Option("--packing", help="Fill rows with several documents: nothing is cut off.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many, of all ranks. [default: all data]")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: the rank's GPU if there is one]")] = None,
    device_map: Annotated[str | None, typer.Option(help="Of accelerate, such as auto: spread the model over devices.")] = None,
    mask: Annotated[str, typer.Option(help="The model's argument that tells padding, which is not counted; or none.")] = (
        "attention_mask"
    ),
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Chunks of 256 KB or 256 rows of a rank.")] = 8,
    output: Annotated[Path | None, typer.Option(help="The folder. [default: runs/calibrate-MODEL-DATA]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of a table.")] = False,
) -> None:
    """Run a model over a corpus and measure the entropy of its activations; under torchrun on many GPUs.

    The same command goes on with a run that was interrupted.
    """
    with _one_line_errors(), joined() as ranks:
        options = ranks.together(
            lambda: Options(
                model=model,
                data=data,
                column=column,
                batch_size=batch_size,
                max_length=max_length,
                packing=packing,
                max_tokens=max_tokens,
                dtype=dtype,
                device=str(_device(device)),
                device_map=device_map,
                mask=None if mask == "none" else mask,
                checkpoint_every=checkpoint_every,
            )
        )
        folder = output or options.default_folder
        try:
            statistics, summary = run_calibration(options, folder, ranks, partial(_calibration_display, ranks, options))
        except KeyboardInterrupt:
            if ranks.is_first:
                typer.echo("Interrupted. The same command goes on from the last checkpoint.", err=True)
            raise typer.Exit(130) from None
        if not ranks.is_first:
            return
        if as_json:
            typer.echo(json.dumps(summary, indent=2))
        else:
            print_calibration(statistics, summary, folder, Console())


def _calibration_display(ranks: Ranks, options: Options, total: int | None, unit: str) -> CalibrationDisplay:
    console = Console(stderr=True, quiet=not ranks.is_first)
    return CalibrationDisplay(console, total, unit, shows_units=options.max_tokens is not None)


@app.command()
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
    with _one_line_errors():
        check_benchmark(benchmark, dtype)
        chosen, numbers = _device(device), parse_sizes(sizes) if sizes else []
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
    from fastentropy.benchmarks.launches import sweep_launches  # needs Triton, which is not there on every system

    typer.echo(f"# {torch.cuda.get_device_name(device)}: the table states_triton.LAUNCHES that is best here")
    for line in sweep_launches(device):
        typer.echo(line)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or histories (history.json).")],
    output: Annotated[
        Path | None, typer.Option(help="The page. [default: report.html in the folder of one run, comparison.html of several]")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the plots as a picture too.")] = None,
) -> None:
    """Write the page of a run again, or compare runs: accuracy against activations removed, and against latency."""
    with _one_line_errors():
        histories = _read_histories(runs)
        several = len(histories) > 1
        page = output or (Path("comparison.html") if several else next(iter(histories)).parent / "report.html")
        for path, suffix in ((page, ".html"), (png, ".png")):
            if path and (path.suffix != suffix or not path.parent.is_dir()):
                raise ValueError(f"{path} cannot be written; name a file that ends in {suffix}, in a folder that exists")
        written = _compare(histories, page, png) if several else _report_again(*histories.popitem(), page, png)
    typer.echo(written)


@app.command()
def doctor() -> None:
    """Show versions, devices and which kernels run on them; exit status 1 if the main job could not run."""
    findings = examine()
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row("ok" if finding.ok else "NO", finding.name, finding.text)
    Console().print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _read_histories(runs: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The histories of runs, by the files that they are read from."""
    histories: dict[Path, dict[str, Any]] = {}
    for run in runs:
        path = run if run.is_file() else run / "history.json"
        if path.resolve() in map(Path.resolve, histories):
            raise ValueError(f"{run} is named twice; name each run once")
        histories[path] = read_history(path)
        try:
            check_history(histories[path])
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return histories


def _report_again(path: Path, history: dict[str, Any], page: Path, png: Path | None) -> str:
    if not history["steps"]:
        raise ValueError(f"{path}: no step is finished yet; there is nothing to report")
    write_report(history, page)
    if png:
        plot_summary(history, png)
    return f"report   {page}"


def _compare(histories: dict[Path, dict[str, Any]], page: Path, png: Path | None) -> str:
    files = map(Path.resolve, histories)
    labels = label_runs([path.parent if path.name == "history.json" else path for path in files])
    labelled = dict(zip(labels, histories.values(), strict=True))
    table = format_comparison(labelled)
    write_comparison(labelled, page)
    if png:
        plot_comparison(labelled, png)
    return f"{table}\n\nreport   {page}"


def _created(recipe: str, options: dict[str, Any], output: Path | None, device: str | None) -> Run:
    chosen = str(_device(device))
    defaults = {"max_drop": 0.005, "max_removed": None, "per_step": 1, "seed": 0, "epochs": 1}
    given: dict[str, Any] = {**defaults, **{name: value for name, value in options.items() if value is not None}}
    settings = Settings(recipe=recipe, device=chosen, **given)
    loaded = load_recipe(recipe, torch.device(chosen), **settings.recipe_options)
    folder = output or Path("runs") / f"{recipe}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return create_run(folder, dataclasses.replace(settings, epochs=options["epochs"] or loaded.epochs), loaded)


def _resumed(folder: Path, recipe: str | None, options: dict[str, object]) -> Run:
    run = open_run(folder)
    if recipe not in (None, run.settings.recipe):
        raise ValueError(f"{folder} is a run of the recipe {run.settings.recipe!r}, not of {recipe!r}; leave the recipe out")
    changed = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if changed:
        raise ValueError(f"--resume takes the options of the run; leave out {', '.join(changed)}")
    _device(run.settings.device)
    return run


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:N")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except SaidByAnother:
        raise typer.Exit(2) from None
