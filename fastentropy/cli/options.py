"""Functions that several commands share: choosing a device, and reporting errors in one line."""

import contextlib
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from fastentropy._utils.errors import joined_lines, one_line
from fastentropy.calibration.ranks import RemoteRankError

#: The option that all commands have: print a result as JSON in place of tables, and nothing else, on standard output.
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables. [default: off]")]


def chosen_device(name: str | None) -> torch.device:
    """Return the device to use.

    Args:
        name: the value of --device. None chooses the GPU if there is one, and the CPU otherwise.

    Returns:
        The device.

    Raises:
        ValueError: `name` is not a CPU or CUDA device that can be used here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:N")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {one_line(error)}") from error
    return device


def option_of(name: str) -> str:
    """Return how the command line writes the option of a parameter: --max-drop for "max_drop"."""
    return f"--{name.replace('_', '-')}"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Report a ValueError or OSError of the `with` block as one line on stderr, and exit with status 2.

    A RemoteRankError exits with status 2 but without a message, because another process reports the error.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {one_line(error) if isinstance(error, OSError) else joined_lines(error)}", err=True)
        raise typer.Exit(2) from None
    except RemoteRankError:
        raise typer.Exit(2) from None
