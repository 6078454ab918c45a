"""The command as a module: `python -m fastentropy`."""

import subprocess
import sys

import pytest

from fastentropy._utils.optional import install_command


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
