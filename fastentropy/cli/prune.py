"""The command `fastentropy prune`: train, prune and fuse a network of a recipe."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastentropy.cli.console import ProgressDisplay, print_history
from fastentropy.cli.options import AsJson, chosen_device, messages, note, one_line_errors, option_of
from fastentropy.pruning.criteria import CRITERIA
from fastentropy.pruning.options import MAX_DROP
from fastentropy.recipes import RECIPES, load_recipe
from fastentropy.recipes.run import Run, create_run, open_run
from fastentropy.recipes.settings import Settings


def prune(
    recipe: Annotated[
        str | None, typer.Argument(help=f"The network and data to train and prune: {', '.join(RECIPES)}. [default: digits]")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help=f"Accept at most this loss of validation accuracy, from 0 to 1. [default: {MAX_DROP}]"),
    ] = None,
    max_removed: Annotated[
        int | None, typer.Option(min=0, help="Remove at most this many activations. [default: no limit]")
    ] = None,
    per_step: Annotated[
        int | None, typer.Option(min=1, help="Activations, or percent of the neurons, to remove in each step. [default: 1]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Random seed: the same seed gives the same removals. [default: 0]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each training. [default: set by the recipe]")] = None,
    epochs_dense: Annotated[
        int | None,
        typer.Option(
            min=0, help="Epochs of the training before the first removal; 0 for a trained network. [default: as --epochs]"
        ),
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help=f"How to choose what to remove first: {', '.join(CRITERIA)}. [default: entropy]")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(help="What to remove: layer, whole activations, or neuron, those of single neurons. [default: layer]"),
    ] = None,
    zeros_together: Annotated[
        bool,
        typer.Option("--zeros-together", help="Remove all activations of zero entropy at once, as published. [default: off]"),
    ] = False,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Stop once the network is this many times as fast. "
            "Needs --criterion entropy-per-latency. [default: no target]",
        ),
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Stop once a call takes at most this many milliseconds. "
            "Needs --criterion entropy-per-latency. [default: no limit]",
        ),
    ] = None,
    collapse: Annotated[
        str | None,
        typer.Option(
            help="'project': approximate linearised convolutions by one where that is faster. [default: exact merging only]"
        ),
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(
            help="'published': entropies of the last epoch's augmented batches, as the code of the paper has them. "
            "[default: of the training images, in eval mode]"
        ),
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="Name of an activation to keep. Repeat the option to keep several. [default: none]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of a network of the recipe. For images: efficientnet_lite0, a name of torchvision or timm, or "
            "package.module:factory. [default: set by the recipe]"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of the recipe's data, or a name to download it by (cifar10 only).")
    ] = None,
    width: Annotated[
        float | None, typer.Option(help="cifar10: multiply the channels of all layers by this number. [default: 1]")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="images: weights to begin with, a safetensors file or a state dict. "
            "[default: those of the package or the factory, or random ones]"
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="images: height and width in pixels. [default: 224]")] = None,
    images_per_epoch: Annotated[
        int | None, typer.Option(help="images: training images in an epoch, and for the entropies. [default: all]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="images: images in a batch of training. [default: 64]")] = None,
    optimizer: Annotated[str | None, typer.Option(help="images: sgd or adamw. [default: sgd]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="images: highest learning rate. [default: 0.02, adamw 0.0005]")
    ] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="images: label smoothing. [default: 0.1]")] = None,
    ema: Annotated[float | None, typer.Option(help="images: decay of a moving average of the weights. [default: off]")] = None,
    distill: Annotated[
        float | None, typer.Option(help="images: also learn from the dense network, with this temperature. [default: off]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="images: train in float32 or bfloat16. [default: the faster one, measured]")
    ] = None,
    cache_gb: Annotated[
        float | None, typer.Option(help="images: keep decoded images in memory up to this size. [default: 4]")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Train with torch.compile. [default: off]")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder to write the run to. [default: runs/RECIPE-DATE]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if available]")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of an interrupted run to continue, with the options it was started with.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train, prune and fuse a network, and write a report.

    The activations that the network needs least are removed step by step, with fine-tuning in between.
    """
    options = {
        "max_drop": max_drop,
        "max_removed": max_removed,
        "per_step": per_step,
        "seed": seed,
        "epochs": epochs,
        "criterion": criterion,
        "granularity": granularity,
        "zeros_together": zeros_together or None,
        "target_speedup": target_speedup,
        "max_latency_ms": max_latency_ms,
        "collapse": collapse,
        "statistics": statistics,
        "protect": protect or None,
        "model": model,
        "data": data,
        "compile": compile or None,
        "epochs_dense": epochs_dense,
        "width": width,
        "weights": weights,
        "image_size": image_size,
        "images_per_epoch": images_per_epoch,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "label_smoothing": label_smoothing,
        "ema": ema,
        "distill": distill,
        "precision": precision,
        "cache_gb": cache_gb,
    }
    errors = messages()
    with one_line_errors():
        if resume is not None:
            run = _open(resume, recipe, {**options, "output": output, "device": device})
        else:
            run = _create(recipe or "digits", options, output, device, errors)
    history = run.outcome or _execute(run, errors)
    if as_json:
        typer.echo(json.dumps(history, indent=2))
    else:
        print_history(history, run.folder, Console())


def _create(recipe: str, options: dict[str, Any], output: Path | None, device: str | None, errors: Console) -> Run:
    chosen = str(chosen_device(device))
    defaults = {"max_drop": MAX_DROP, "max_removed": None, "per_step": 1, "seed": 0, "epochs": 1}
    given: dict[str, Any] = {**defaults, **{name: value for name, value in options.items() if value is not None}}
    settings = Settings(recipe=recipe, device=chosen, **given)
    with ProgressDisplay(errors) as display, display.phase("read the data") as report:
        loaded = load_recipe(recipe, torch.device(chosen), report, **settings.recipe_options)
    for text in loaded.notes:
        note(text)
    protect, epochs = [*settings.protect, *loaded.protected], options["epochs"] or loaded.epochs
    settings = dataclasses.replace(settings, epochs=epochs, protect=protect, **loaded.chosen)
    folder = output or Path("runs") / f"{recipe}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return create_run(folder, settings, loaded)


def _execute(run: Run, errors: Console) -> dict[str, Any]:
    try:
        with one_line_errors(), ProgressDisplay(errors) as display:
            return run.execute(display)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. Finished steps are on disk; continue with: fastentropy prune --resume {run.folder}", err=True)
        raise typer.Exit(130) from None


def _open(folder: Path, recipe: str | None, options: dict[str, object]) -> Run:
    run = open_run(folder)
    if recipe not in (None, run.settings.recipe):
        raise ValueError(f"{folder} is a run of the recipe {run.settings.recipe!r}, not of {recipe!r}; leave the recipe out")
    changed = [option_of(name) for name, value in options.items() if value is not None]
    if changed:
        raise ValueError(f"--resume takes the options of the run; leave out {', '.join(changed)}")
    if run.outcome:
        note(f"{folder} is already finished, and was left as it is")
    else:
        chosen_device(run.settings.device)
    return run
