"""On several ranks, the counts of all are added up, and rank 0 writes."""

import pytest
import torch
import torch.multiprocessing

from tests.monitoring import ranks
from tests.monitoring.loops import read_lines

pytestmark = pytest.mark.slow  # processes for the ranks start within seconds


def test_first_rank_writes_the_figures_of_all(tmp_path):
    torch.multiprocessing.spawn(ranks.work, (tmp_path,), nprocs=ranks.RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks.RANKS))
    assert sorted(path.name for path in tmp_path.glob("lines-*")) == ["lines-0"]
    assert first["latest"] == second["latest"]
    inputs = [torch.cat(pair) for pair in zip(first["inputs"], second["inputs"], strict=True)]
    assert len(inputs) == 4
    for step, figures in read_lines(tmp_path / "lines-0").items():
        on = (inputs[step] > 0).double().mean(0)
        shares = {"dead/layers.1": float((on == 0).double().mean()), "always_on/layers.1": float((on == 1).double().mean())}
        assert {key: figures[key] for key in shares} == pytest.approx(shares, abs=1e-12)
    assert list(read_lines(tmp_path / "lines-0")) == [0, 2]
    assert first["latest"]["layers.1"] == [int(inputs[2].numel()), *ranks.states(inputs[2])]
