"""The command line: five plain functions, each registered as a command.

Errors that the user can fix are reported as one line on stderr, with exit status 2.
"""

import typer

from fastentropy.cli import bench, calibrate, doctor, prune, report

app = typer.Typer(
    help="Find the layers that a network does not need, and take them out so that it really runs faster.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(prune.prune)
app.command()(calibrate.calibrate)
app.command()(bench.bench)
app.command()(report.report)
app.command()(doctor.doctor)
