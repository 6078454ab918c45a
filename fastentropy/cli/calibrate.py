"""The command `fastentropy calibrate`: measure the entropy of a model's activations over a corpus."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastentropy.calibration.pretrained import DTYPES
from fastentropy.calibration.ranks import Ranks, init_ranks
from fastentropy.calibration.run import PAGE, Options, run_calibration
from fastentropy.cli.console import CalibrationDisplay, print_calibration
from fastentropy.cli.options import AsJson, chosen_device, messages, one_line_errors


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, or its name on the Hugging Face hub.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text (.txt, .jsonl, .parquet) or images: a file, a folder, a glob pattern, "
            "or the name of a Hugging Face dataset."
        ),
    ],
    column: Annotated[
        str | None, typer.Option(help="Column of a table that holds the documents. [default: text, image or img]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row. [default: 512, or the model's limit if lower]")
    ] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Fill each row with several documents, so that nothing is cut off. [default: off]")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many tokens, counted over all ranks. [default: all data]")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: the rank's GPU if available]")] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread the model over devices by this map of accelerate, such as auto. [default: one device]"),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="Name of the model's argument that holds the padding mask; 'none' counts padding too.")
    ] = "attention_mask",
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Chunks that a rank reads between checkpoints: 256 KB of text, or 256 rows of a table.")
    ] = 8,
    compile_model: Annotated[
        bool,
        typer.Option("--compile", help="Compile the repeated layers with torch.compile, and count inside. [default: off]"),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write the run to. [default: runs/calibrate-MODEL-DATA-DIGEST]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the entropy of a model's activations over a corpus.

    Start it with torchrun to use several GPUs. Repeat the command to continue a run that was interrupted.
    """
    with one_line_errors(), init_ranks() as ranks:
        options = ranks.run_on_all(
            lambda: Options(
                model=model,
                data=data,
                column=column,
                batch_size=batch_size,
                max_length=max_length,
                packing=packing,
                max_tokens=max_tokens,
                dtype=dtype,
                device=str(chosen_device(device)),
                device_map=device_map,
                mask=None if mask == "none" else mask,
                checkpoint_every=checkpoint_every,
                compile=compile_model,
            )
        )
        folder = output or options.default_folder
        try:
            statistics, summary = run_calibration(options, folder, ranks, partial(_calibration_display, ranks, options))
        except KeyboardInterrupt:
            if ranks.is_first:
                typer.echo("Interrupted. Repeat the command to continue from the last checkpoint.", err=True)
            raise typer.Exit(130) from None
        if not ranks.is_first:
            return
        if as_json:
            typer.echo(json.dumps(summary, indent=2))
        else:
            print_calibration(statistics, summary, folder / PAGE, Console())


def _calibration_display(ranks: Ranks, options: Options, total: int | None, unit: str) -> CalibrationDisplay:
    console = messages()
    console.quiet = console.quiet or not ranks.is_first
    return CalibrationDisplay(console, total, unit, shows_units=options.max_tokens is not None)
