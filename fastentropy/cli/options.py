"""The parts that commands share: choosing a device, and reporting errors in one line."""

import contextlib
from collections.abc import Iterator

import torch
import typer

from fastentropy._utils.errors import one_line
from fastentropy.calibration.ranks import RemoteRankError


def chosen_device(name: str | None) -> torch.device:
    """Return the device of --device, which must be usable, or the default one. Raises ValueError."""
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


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Report an error that the user can fix as one line on stderr, with exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except RemoteRankError:
        raise typer.Exit(2) from None
