"""Run `fastentropy prune images` several times in a row, killed at one moment after the other.

The children of pytest's process could not: PyTorch may have started threads there, for which it refuses gradients after a fork.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from typer.testing import CliRunner

from fastentropy.cli import app
from fastentropy.recipes import run
from tests._helpers.kill_points import die_at


def main(folder, options, moments):
    """Run with the options, then resume the run, and print the exit statuses as JSON. A negative status is a signal."""
    torch.set_num_threads(1)
    run.write_report = lambda history, path: None
    run.final_latencies = lambda *networks: {}
    statuses = []
    for moment in moments:
        if not (child := os.fork()):
            die_at(moment)
            _run(options)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        options = ["--resume", folder] if (Path(folder) / "history.json").exists() else options
    print(json.dumps(statuses))


def _run(options):
    """Run the command, and end the process."""
    result = CliRunner().invoke(app, ["prune", *options])
    if result.exit_code:
        print(result.output, *traceback.format_exception(result.exception), file=sys.stderr, flush=True)
    os._exit(result.exit_code)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
