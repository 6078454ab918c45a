"""The command line: arguments in, runs and tables out. Bad input ends with one line and exit status 2."""

import contextlib
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastentropy.console import ProgressDisplay, print_history
from fastentropy.doctor import examine
from fastentropy.recipes import RECIPES, load_recipe
from fastentropy.runs import Run, Settings, create_run, open_run

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
    output: Annotated[Path | None, typer.Option(help="The run folder. [default: runs/RECIPE-DATE]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if there is one]")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run; it keeps its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the history as JSON instead of a table.")] = False,
) -> None:
    """Train a network, remove its needless activations one by one, fuse what became linear, and report."""
    options = {"max_drop": max_drop, "max_removed": max_removed, "per_step": per_step, "seed": seed, "epochs": epochs}
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
def doctor() -> None:
    """Show versions, devices and which kernels run on them; exit status 1 if the main job could not run."""
    findings = examine()
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row("ok" if finding.ok else "NO", finding.name, finding.text)
    Console().print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _created(recipe: str, options: dict[str, float | int | None], output: Path | None, device: str | None) -> Run:
    chosen = _device(device)
    defaults = {"max_drop": 0.005, "max_removed": None, "per_step": 1, "seed": 0, "epochs": load_recipe(recipe, chosen).epochs}
    given: dict[str, Any] = {**defaults, **{name: value for name, value in options.items() if value is not None}}
    folder = output or Path("runs") / f"{recipe}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return create_run(folder, Settings(recipe=recipe, device=str(chosen), **given))


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
