"""The command as a whole, also as a module: `python -m fastentropy`."""

import inspect
import logging
import platform
import subprocess
import sys
import warnings

import pytest
import torch
import typer
from typer.testing import CliRunner

import fastentropy as fe
from fastentropy._utils.optional import install_command
from fastentropy.cli import app
from fastentropy.cli.options import AsJson, messages, note, one_line_errors, with_verbosity
from tests._helpers.command_line import assert_one_line

COMMANDS = [each.callback for each in app.registered_commands]


def invoke(*arguments):
    return CliRunner().invoke(app, arguments)


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


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_json_means_the_same_in_every_command(command):
    assert inspect.signature(command).parameters["as_json"].annotation is AsJson


def test_version_is_that_of_the_package():
    expected = f"fastentropy {fe.__version__} (Python {platform.python_version()}, PyTorch {torch.__version__})\n"
    assert invoke("--version").output == invoke("--version", "prune").output == expected


@pytest.mark.parametrize("arguments", [[], ["prune"], ["doctor"]])
def test_short_help_is_the_help(arguments):
    assert invoke(*arguments, "-h").output == invoke(*arguments, "--help").output
    assert "--help" in invoke(*arguments, "-h").output


def test_shell_completion_is_offered(monkeypatch):
    """Typer looks for the shell that started the process, unless this variable tells it to take the name that is given."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="fastentropy")
    assert result.exit_code == 0
    assert "_FASTENTROPY_COMPLETE" in result.output


@pytest.fixture
def command():
    """A command that says something in each of the ways in which commands do."""
    made = typer.Typer()

    @made.command()
    @with_verbosity
    def run(fails: bool = False) -> None:
        """Say something."""
        note("a note")
        messages().print("progress")
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("fastentropy_kernels.part").info("a log entry")
        with one_line_errors():
            if fails:
                raise ValueError("it failed")
        typer.echo("the result")

    return lambda *arguments: CliRunner().invoke(made, arguments)


@pytest.mark.filterwarnings("ignore:a warning")
@pytest.mark.parametrize(
    ("option", "said"),
    [("-q", []), ("--quiet", []), ("-v", ["a note", "progress", "a log entry"]), (None, ["a note", "progress"])],
)
def test_quiet_and_verbose(command, option, said):
    result = command(*([option] if option else []))
    assert result.exit_code == 0, result.output
    assert result.stdout == "the result\n"
    assert result.stderr.splitlines() == said


def test_quiet_ignores_warnings(command, recwarn):
    command("-q")
    assert not recwarn
    command()
    assert len(recwarn) == 1


@pytest.mark.filterwarnings("ignore:a warning")
@pytest.mark.parametrize(("option", "shows"), [("-q", False), ("-v", True)])
def test_an_error_is_one_line_and_has_a_traceback_if_verbose(command, option, shows):
    result = command("--fails", option)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "Error: it failed"
    assert ("Traceback" in result.stderr) == shows


def test_quiet_and_verbose_exclude_each_other(command):
    assert_one_line(command("-q", "-v"), "--quiet and --verbose exclude each other")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_can_be_quiet(command):
    assert {"quiet", "verbose"} <= set(inspect.signature(command).parameters)
