"""The command `fastentropy collect`: measure the entropy of an image classifier's activations over images."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastentropy._utils.optional import install_command
from fastentropy.cli.console import ProgressDisplay
from fastentropy.cli.options import AsJson, check_writable, chosen_device, messages, note, one_line_errors
from fastentropy.reporting.plots import figure_format


def collect(
    model: Annotated[
        str,
        typer.Argument(
            help="efficientnet_lite0, a name of torchvision or timm, or package.module:factory for a function that returns a "
            "network."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder with image files or parquet files; of several splits the training.")],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights, a safetensors file or a state dict. [default: those of the package or the factory, or random ones]"
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Take only so many images, drawn at random. [default: all images]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if available]")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write for fe.Statistics.load: .safetensors. [default: none]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File to draw the plot to: .png, .svg or .pdf. [default: none]")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the entropy of an image classifier's activations over your images.

    Language models and image models of transformers have the command fastentropy calibrate.
    """
    with one_line_errors():
        if output:
            check_writable(output, ".safetensors")
        if plot:
            figure_format(plot)
            check_writable(plot, plot.suffix)
        try:
            from fastentropy.recipes.image_statistics import collect_statistics, draw_sources
            from fastentropy.recipes.images_data import list_images
            from fastentropy.recipes.images_models import create_network
        except ImportError as error:
            raise ValueError(f"collecting over images needs {error.name}: {install_command('images')}") from error
        chosen, sources = chosen_device(device), draw_sources(list_images(data), max_images)
        network = create_network(model, weights, image_size)
        for text in network.notes:
            note(text)
        with ProgressDisplay(messages()) as display, display.phase("collect") as report:
            statistics = collect_statistics(
                network, sources, size=image_size, batch_size=batch_size, device=chosen, report=report
            )
        if output:
            statistics.save(output)
        if plot:
            statistics.plot(plot)
    if as_json:
        values = {"images": len(sources), "sites": statistics.to_dict(), "notes": list(statistics.notes)}
        typer.echo(json.dumps(values, indent=2))
        return
    typer.echo(f"{statistics}\n\nimages   {len(sources)}")
    for path in filter(None, (output, plot)):
        typer.echo(f"written  {path}")
