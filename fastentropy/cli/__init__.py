"""The command line: plain functions, each registered as a command.

Errors that the user can fix are reported as one line on stderr, with exit status 2.
"""

import platform
from typing import Annotated

import torch
import typer

from fastentropy._utils.version import __version__
from fastentropy.cli import bench, calibrate, collect, doctor, fuse, prune, report
from fastentropy.cli.options import with_verbosity

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (prune.prune, collect.collect, calibrate.calibrate, fuse.fuse, bench.bench, report.report, doctor.doctor):
    app.command()(with_verbosity(command))


def _print_version(is_asked: bool) -> None:
    """Print the version and end, if it is asked for."""
    if is_asked:
        typer.echo(f"fastentropy {__version__} (Python {platform.python_version()}, PyTorch {torch.__version__})")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find the layers that a network does not need, and take them out so that it really runs faster."""
