import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastentropy as fe
from fastentropy.calibration.checkpoints import Checkpoint, Tally
from fastentropy.calibration.data.batching import Batch
from fastentropy.calibration.data.documents import Problem
from fastentropy.collector.site_statistics import SiteStatistics

PROBLEM = Problem("a.txt", "a line is not UTF-8", "byte", 7, 2)


def statistics(seed=0):
    counts = torch.randint(0, 1 << 40, (5, 3), generator=torch.Generator().manual_seed(seed))
    return fe.Statistics({"mlp.act": SiteStatistics("silu", counts, 3), "head.0": SiteStatistics("gelu", counts[:2])})


def figures(statistics):
    return {name: (site.activation, site.counts.tolist(), site.nan) for name, site in statistics.items()}


@pytest.fixture
def checkpoint():
    settings = {"model": "0123", "max tokens": None, "packing": True, "batch size": 8}
    return Checkpoint(settings, statistics(), Tally(1, 2, 3, 4, 5, [PROBLEM]), 17, 2.5)


def test_round_trip(checkpoint, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path)
    loaded = Checkpoint.load(path)
    assert figures(loaded.statistics) == figures(checkpoint.statistics)
    assert (loaded.settings, loaded.tally, loaded.chunk, loaded.seconds) == (checkpoint.settings, checkpoint.tally, 17, 2.5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_checkpoint_loads_as_statistics(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "checkpoint.safetensors")
    assert figures(fe.Statistics.load(tmp_path / "checkpoint.safetensors")) == figures(statistics())


def test_checkpoint_without_counts(tmp_path):
    Checkpoint({}, fe.Statistics({}), Tally()).save(tmp_path / "checkpoint.safetensors")
    assert Checkpoint.load(tmp_path / "checkpoint.safetensors").tally == Tally()


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_damaged_file(checkpoint, tmp_path, kept):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged or not a checkpoint"):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    "rest",
    ["", "[]", "3", "{}", {"tally": {"words": 3}}, {"tally": {"problems": [[1]]}}, {"chunk": None}, {"seconds": "many"}],
)
def test_other_file(checkpoint, tmp_path, rest):
    path = tmp_path / "checkpoint.safetensors"
    statistics().save(path)
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        Checkpoint.load(path)
    whole = {"settings": {}, "tally": {"problems": []}, "chunk": 0, "seconds": 0.0}
    said = rest if isinstance(rest, str) else json.dumps({**whole, **rest})
    save_file(load_file(path), path, {"fastentropy_sites": "[]", "fastentropy_calibration": said})
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        Checkpoint.load(path)


def test_tally_adds_batches():
    tally = Tally()
    tally.add(Batch({}, tokens=5, documents=2, truncated=1, tokens_cut=7))
    tally.add(Batch({}, tokens=3, documents=1))
    assert tally == Tally(batches=2, tokens=8, documents=3, truncated=1, tokens_cut=7)


def test_tallies_add_up_in_any_order():
    first, second = Tally(1, 2, 3, 4, 5, [PROBLEM._replace(path="b.txt"), PROBLEM]), Tally(10, 20, 30, 40, 50, [PROBLEM])
    together = Tally(11, 22, 33, 44, 55, [PROBLEM._replace(times=4), PROBLEM._replace(path="b.txt")])
    assert first + second == second + first == together
