"""The command `fastentropy fuse`: make a network faster, and write it to files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from fastentropy.cli.options import AsJson, check_writable, chosen_device, messages, note, one_line_errors
from fastentropy.fusion import FusedModel
from fastentropy.fusion import fuse as fuse_network
from fastentropy.fusion.backends import Backend
from fastentropy.recipes.given_networks import GivenNetwork, given_network, parse_shape


def fuse(
    model: Annotated[
        str,
        typer.Argument(
            help="efficientnet_lite0, a name of torchvision or timm, package.module:factory for a function that returns a "
            "network, or the folder of a finished run of fastentropy prune."
        ),
    ],
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes of an input, such as 16,3,224,224; repeat it for further inputs. "
            "[default: those of the run, or 16 images of 224×224]"
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights, a safetensors file or a state dict. [default: those of the run or the factory, or random]"),
    ] = None,
    backend: Annotated[
        str, typer.Option(help=f"What runs the result: {', '.join(get_args(Backend))}. auto takes the fastest.")
    ] = "eager",
    output: Annotated[Path | None, typer.Option(help="File to write for fe.load: .pt2. [default: none]")] = None,
    onnx: Annotated[Path | None, typer.Option(help="File to write as ONNX: .onnx. [default: none]")] = None,
    package: Annotated[Path | None, typer.Option(help="File to write as an AOTInductor package: .pt2. [default: none]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if available]")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a network as fast as it gets without another output, and write it to files.

    Prints which parts were merged, and the times before and after.
    """
    with one_line_errors():
        if backend not in get_args(Backend):
            raise ValueError(f"--backend {backend} is none of {', '.join(get_args(Backend))}")
        named = {"output": output, "onnx": onnx, "package": package}
        files = {kind: path for kind, path in named.items() if path}
        for kind, path in files.items():
            check_writable(path, ".onnx" if kind == "onnx" else ".pt2")
        given = given_network(model, list(map(parse_shape, shape or ())), weights, chosen_device(device))
        for text in given.notes:
            note(text)
        fused = _fuse_and_write(given, cast(Backend, backend), files)
    if as_json:
        typer.echo(json.dumps({**fused.report.to_dict(), "files": {kind: str(path) for kind, path in files.items()}}, indent=2))
        return
    typer.echo(str(fused.report))
    for path in files.values():
        typer.echo(f"written  {path}")
    if not files:
        note("nothing was written; name a file with --output, --onnx or --package")


def _fuse_and_write(given: GivenNetwork, backend: Backend, files: Mapping[str, Path]) -> FusedModel:
    """Fuse a network and write it. Raise ValueError if that is impossible with this network or on this machine."""
    try:
        progress = False if messages().quiet else None
        fused = fuse_network(given.model, given.inputs, backend=backend, progress=progress)
        writers = {"output": fused.save, "onnx": fused.save_onnx, "package": fused.save_package}
        for kind, path in files.items():
            writers[kind](path)
    except (ImportError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    return fused
