"""What several commands share: their common options, choosing a device, and reporting errors in one line."""

import contextlib
import functools
import inspect
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastentropy._utils.errors import joined_lines, one_line
from fastentropy.calibration.ranks import RemoteRankError

#: The option that all commands have: print a result as JSON in place of tables, and nothing else, on standard output.
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables. [default: off]")]
#: The options of `with_verbosity`.
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and errors. [default: off]")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also print what the library logs, and the traceback of an error. [default: off]"),
]
#: How much the present command says: less than usual (-1), as usual (0) or more (1).
_VERBOSITY = ContextVar("_VERBOSITY", default=0)


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with two more options, --quiet and --verbose."""

    @functools.wraps(command)
    def run(*args: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        with one_line_errors():
            if quiet and verbose:
                raise ValueError("--quiet and --verbose exclude each other; leave out one of them")
        with _saying(int(verbose) - int(quiet)):
            command(*args, **options)

    signature = inspect.signature(command)
    more = {"quiet": Quiet, "verbose": Verbose}
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=False, annotation=kind) for name, kind in more.items()]
    vars(run)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *added])
    run.__annotations__ = {**command.__annotations__, **more}
    return run


@contextlib.contextmanager
def _saying(verbosity: int) -> Iterator[None]:
    """Say less (-1), as much as usual (0), or more (1) inside of the block."""
    token, handler = _VERBOSITY.set(verbosity), logging.StreamHandler()
    loggers = [logging.getLogger(name) for name in ("fastentropy", "fastentropy_kernels")] if verbosity > 0 else []
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if verbosity < 0:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)
        _VERBOSITY.reset(token)


def messages() -> Console:
    """Return the console for progress, on the standard error, which shows nothing with --quiet."""
    return Console(stderr=True, quiet=_VERBOSITY.get() < 0)


def note(text: str) -> None:
    """Print a line that is no part of the result on the standard error, unless --quiet is given."""
    if _VERBOSITY.get() >= 0:
        typer.echo(text, err=True)


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


def check_writable(path: Path, suffix: str) -> None:
    """Raise ValueError if a file has another suffix or is in no folder that exists."""
    if path.suffix != suffix or not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written; name a file that ends in {suffix}, in a folder that exists")


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
        if _VERBOSITY.get() > 0:
            typer.echo(traceback.format_exc(), err=True)
        typer.echo(f"Error: {one_line(error) if isinstance(error, OSError) else joined_lines(error)}", err=True)
        raise typer.Exit(2) from None
    except RemoteRankError:
        raise typer.Exit(2) from None
