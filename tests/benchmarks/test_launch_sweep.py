"""The sweep over launch configurations, without a GPU: its candidates, and the line that it prints."""

import pytest

pytest.importorskip("triton")

from fastentropy.benchmarks import launch_sweep
from fastentropy_kernels.states.launch_triton import LAUNCHES, Launch


@pytest.mark.parametrize("line", LAUNCHES)
def test_candidates_start_with_present_line_and_fill_threads(line):
    candidates = list(launch_sweep.candidates(line))
    assert candidates[0] == LAUNCHES[line]
    assert len(set(candidates)) == len(candidates) > 10
    assert all(launch.num_warps * 32 * 16 <= launch.tile_bytes >= launch.row_bytes for launch in candidates)


def test_all_lines_are_swept():
    assert launch_sweep.CASES.keys() == LAUNCHES.keys()


@pytest.mark.parametrize(("milliseconds", "expected"), [(0.5, Launch(4096, 256, 4, 16)), (0.99, LAUNCHES["rows"])])
def test_best_line_ignores_noise(milliseconds, expected):
    shown = launch_sweep.best_line("rows", [{LAUNCHES["rows"]: 1.0, Launch(4096, 256, 4, 16): milliseconds}] * 2)
    name, launch = shown.split("  # ")[0].rstrip(",").split(": ", 1)
    assert (name, launch) == ('"rows"', str(expected))
