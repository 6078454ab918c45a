"""The command as a whole, also as a module: `python -m fastentropy`."""

import inspect
import subprocess
import sys

import pytest

from fastentropy._utils.optional import install_command
from fastentropy.cli import app
from fastentropy.cli.options import AsJson


@pytest.mark.slow
def test_module_runs_as_command_and_names_missing_library():
    code = "import sys; sys.modules['typer'] = None; from fastentropy.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    advice = f"Error: the command line needs typer; install it with: {install_command('cli')}"
    assert result.stderr.splitlines() == [advice]
    shown = subprocess.run([sys.executable, "-m", "fastentropy", "--help"], capture_output=True, text=True, check=True)
    assert "prune" in shown.stdout
    assert "doctor" in shown.stdout


@pytest.mark.parametrize(
    "command", [command.callback for command in app.registered_commands], ids=lambda command: command.__name__
)
def test_json_means_the_same_in_every_command(command):
    assert inspect.signature(command).parameters["as_json"].annotation is AsJson
