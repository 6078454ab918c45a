"""The command `fastentropy prune`."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastentropy.cli.console import ProgressDisplay, print_history
from fastentropy.cli.options import chosen_device, one_line_errors
from fastentropy.pruning.criteria import CRITERIA
from fastentropy.recipes import RECIPES, load_recipe
from fastentropy.recipes.run import Run, Settings, create_run, open_run


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
    with one_line_errors():
        if resume is not None:
            run = _resumed(resume, recipe, {**options, "output": output, "device": device})
        else:
            run = _created(recipe or "digits", options, output, device)
    try:
        with one_line_errors(), ProgressDisplay(errors) as display:
            history = run.execute(display)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. What is finished is on disk; go on with: fastentropy prune --resume {run.folder}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(history, indent=2))
    else:
        print_history(history, run.folder, Console())


def _created(recipe: str, options: dict[str, Any], output: Path | None, device: str | None) -> Run:
    chosen = str(chosen_device(device))
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
    chosen_device(run.settings.device)
    return run
