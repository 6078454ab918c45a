"""A calibration whose ranks are killed at any moment, and which is continued on any number of ranks, counts each batch once."""

import itertools
import os
import signal
import time

import pytest

from fastentropy.calibration.checkpoints import Checkpoint
from tests.calibration import cases

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")]

FILES = {"statistics.safetensors", "summary.json", "report.html"}
KILLS = 12
#: The shortest time of a forward pass in seconds, so that a kill can happen during the run.
SECONDS = 0.004


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    cases.save_model("llama", folder / "llama")
    cases.save_texts(folder / "texts", 13)
    return folder


@pytest.fixture(scope="module")
def arguments(place):
    options = ["--batch-size", 3, "--checkpoint-every", 1]
    return lambda output, *more: [place / "llama", "--data", place / "texts", "--output", output, *options, *more]


@pytest.fixture(scope="module")
def expected(server, place, arguments):
    """The outcome of an undisturbed run."""
    assert server.run(arguments(place / "whole"))[0].status == 0
    counts, tally = cases.outcome(place / "whole")
    assert (counts, tally[1]) == cases.by_hand("llama", place / "texts")
    return counts, tally


def assert_every_file_is_whole(folder):
    """Files under their final names are complete; others lie in a temporary folder."""
    for path in folder.iterdir() if folder.exists() else ():
        assert path.name in FILES | {"checkpoint.safetensors"} or path.name.startswith(".tmp-")
    if (folder / "checkpoint.safetensors").exists():
        Checkpoint.load(folder / "checkpoint.safetensors")


def assert_finished(folder, expected):
    assert {path.name for path in folder.iterdir()} == FILES
    assert cases.outcome(folder) == expected


def test_killed_around_each_file_replacement(server, arguments, expected, tmp_path):
    """Rank 0 of two dies at each moment in turn, and then 1 to 3 ranks continue."""
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        command = arguments(folder, "--checkpoint-every", 4)
        results = server.run(command, ranks=2, injected={0: ("die_at", moment)})
        if results[0].status == 0:
            break
        assert results[0].status == -signal.SIGKILL
        assert_every_file_is_whole(folder)
        ranks = 1 + moment % 3
        assert [result.status for result in server.run(command, ranks=ranks)] == [0] * ranks
        assert_finished(folder, expected)
    assert moment == 2 * (2 + len(FILES))


@pytest.mark.parametrize("limit", [[], ["--max-tokens", 700]], ids=["all", "limited"])
def test_killed_at_any_time(server, arguments, expected, tmp_path, drawn, limit):
    if limit:
        assert server.run(arguments(tmp_path / "whole", *limit))[0].status == 0
        expected = cases.outcome(tmp_path / "whole")
    kills = 0
    for run in itertools.count():
        folder, longest = tmp_path / f"run{run}", 0.6
        while not is_finished(folder):
            kills += was_killed(server, arguments(folder, *limit), drawn, longest)
            longest *= 1.1  # so that a run also ends if the machine becomes slow
            assert_every_file_is_whole(folder)
        assert_finished(folder, expected)
        if kills >= KILLS:
            break


def is_finished(folder):
    return folder.exists() and {path.name for path in folder.iterdir()} == FILES


def was_killed(server, arguments, drawn, longest):
    """Start 1 to 3 ranks, and kill one or all of them after a wait; return whether any of them was still running."""
    ranks = drawn.randint(1, 3)
    children = server.start(arguments, ranks=ranks, injected=dict.fromkeys(range(ranks), ("slow_down", SECONDS)))
    time.sleep(drawn.uniform(0.1, longest))
    for child in [drawn.choice(children)] if drawn.random() < 0.5 else children:
        os.kill(child, signal.SIGKILL)
    results = server.finish()
    statuses = [result.status for result in results]
    assert -signal.SIGKILL in statuses or statuses == [0] * ranks, results
    return -signal.SIGKILL in statuses
