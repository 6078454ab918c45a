"""A pruning run that is killed at any moment and resumed ends like an undisturbed one."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests._helpers.paths import PYTHONPATH

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")]

STEPS = 4
KILLS = 12


class Server:
    """Runs `child_process.prune` in children of a process that has imported PyTorch."""

    def __init__(self, outcome):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        self._outcome = outcome
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pruning.child_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, folder, fatal_moment=None):
        """Start a child; return its process number, which is not reused before `finish`."""
        self._outcome.unlink(missing_ok=True)
        return int(self._ask(json.dumps([str(folder), str(self._outcome), fatal_moment])))

    def has_ended(self):
        return self._outcome.exists()

    def finish(self):
        """Wait for the child; return the result of its run, or None if it was killed."""
        code = int(self._ask("finish"))
        assert code in (0, -signal.SIGKILL)
        outcome = None if code else pickle.loads(self._outcome.read_bytes())
        assert not isinstance(outcome, str), outcome
        return outcome

    def stop(self):
        self._process.kill()
        self._process.communicate()

    def _ask(self, line):
        print(line, file=self._process.stdin, flush=True)
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("outcome") / "outcome.pickle")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory):
    """The outcome of an undisturbed run."""
    server.start(tmp_path_factory.mktemp("whole"))
    (removed, steps, kept_step), weights = server.finish()
    assert (len(removed), len(steps), kept_step) == (STEPS - 2, STEPS, STEPS - 2)
    return (removed, steps, kept_step), weights


def finished_steps(folder):
    return len(list(folder.glob("*/step.json")))


def temporary_files(folder):
    """Return the temporary files below a folder: ours begin with .tmp-, those of safetensors with .tmp."""
    return {path for path in folder.rglob("*") if any(part.startswith(".tmp") for part in path.relative_to(folder).parts)}


def assert_every_file_is_whole(folder):
    for path in set(folder.rglob("*.*")) - temporary_files(folder):
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def test_killed_around_each_file_replacement(server, expected, tmp_path):
    """Each step is killed at each of its moments in turn, the last of which is when the step is finished."""
    fatal_moment = kills = finished = 0
    server.start(tmp_path, fatal_moment)
    while not (outcome := server.finish()):
        kills += 1
        assert_every_file_is_whole(tmp_path)
        fatal_moment = 0 if finished_steps(tmp_path) > finished else fatal_moment + 1
        finished = finished_steps(tmp_path)
        server.start(tmp_path, fatal_moment)
    assert outcome == expected
    assert not temporary_files(tmp_path)
    assert kills >= 2 * len(list(tmp_path.glob("*/*"))) >= 20


def test_killed_at_any_time(server, expected, tmp_path, drawn):
    began = time.monotonic()
    server.start(tmp_path / "measured")
    server.finish()
    longest = (time.monotonic() - began) / 4

    def wait(folder):
        nonlocal longest
        time.sleep(drawn.uniform(0, longest))
        longest *= 1.1  # so that steps are also finished if the machine becomes slow

    assert_runs_end_as_expected(server, expected, tmp_path, wait)


def test_killed_while_writing_weights(server, expected, tmp_path, drawn):
    def wait(folder):
        """Wait until the weights of the next step, or of the one after it, begin to be written."""
        step = folder / f"{finished_steps(folder) + drawn.randrange(2):02d}"
        before = set(step.glob(".tmp*"))
        while not (server.has_ended() or set(step.glob(".tmp*")) - before):
            time.sleep(0.0005)
        time.sleep(drawn.uniform(0, 0.01))

    assert_runs_end_as_expected(server, expected, tmp_path, wait)


def assert_runs_end_as_expected(server, expected, tmp_path, wait):
    """Kill runs after a wait, and resume them until they end; repeat until there were KILLS kills."""
    kills = 0
    for run in itertools.count():
        folder = tmp_path / f"run{run}"
        while not (outcome := killed(server, folder, wait)):
            kills += 1
            assert_every_file_is_whole(folder)
        assert outcome == expected
        assert not temporary_files(folder)
        if kills >= KILLS:
            break


def killed(server, folder, wait):
    """Start a child and kill it after a wait; return the result of its run, or None if it was killed."""
    child = server.start(folder)
    wait(folder)
    if not server.has_ended():
        os.kill(child, signal.SIGKILL)
    return server.finish()
