import json
import pickle
import re

import pytest
import torch
from torch import nn

from fastentropy import SiteStatistics, Statistics, Step
from fastentropy._utils.files import save_tensors
from fastentropy.pruning.steps import StepFolder, random_state, set_random_state

OPTIONS = {"max_drop": 0.01}
COUNTS = {"b": torch.tensor([[1, 0, 1]]), "a": torch.tensor([[1, 0, 3]])}
STATISTICS = Statistics({name: SiteStatistics("relu", counts) for name, counts in COUNTS.items()})
STEP = Step(("c",), STATISTICS.layer_entropy(), 0.1 + 0.2, {"test": 1 / 3})


@pytest.fixture
def folder(tmp_path):
    folder = StepFolder(tmp_path / "steps", OPTIONS)
    folder.save(0, STEP, nn.Linear(2, 3), STATISTICS, random_state())
    return folder


def test_steps_round_trip(folder):
    folder.save(1, STEP, nn.Linear(2, 3), STATISTICS, random_state())
    assert folder.load() == [STEP, STEP]
    assert list(folder.load()[0].layer_entropy) == ["b", "a"]


def test_missing_folder_has_no_steps(tmp_path):
    assert StepFolder(tmp_path / "none", OPTIONS).load() == []


def test_unfinished_step_is_ignored(folder):
    folder.save(1, STEP, nn.Linear(2, 3), STATISTICS, random_state())
    (folder.path / "01" / "step.json").unlink()
    assert len(folder.load()) == 1


def test_weights_round_trip(tmp_path):
    folder, model, other = StepFolder(tmp_path, OPTIONS), nn.Linear(2, 3), nn.Linear(2, 3)
    folder.save(0, STEP, model, STATISTICS, random_state())
    folder.load_weights(0, other)
    assert torch.equal(other.weight, model.weight)


def test_weights_of_another_model(folder):
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model"):
        folder.load_weights(0, nn.Linear(2, 4))


def test_random_state_round_trip(folder):
    folder.restore_random_state(0)
    first = torch.rand(3)
    torch.rand(100)
    set_random_state(folder.restore_random_state(0))
    assert torch.equal(torch.rand(3), first)


def test_state_dict_without_tensors(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 2}

    with pytest.raises(ValueError, match="holds _extra_state, which are not tensors"):
        StepFolder(tmp_path, OPTIONS).save(0, STEP, Extra(2, 3), STATISTICS, random_state())
    assert not list(tmp_path.iterdir())


def test_options_of_another_run(folder):
    with pytest.raises(ValueError, match=r"holds a run with the options \{'max_drop': 0\.01\}, not \{'max_drop': 0\.5\}"):
        StepFolder(folder.path, {"max_drop": 0.5})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score": float("nan")}, "its score is nan"),
        ({"score": "high"}, "could not convert string to float: 'high'"),
        ({"metrics": {"test": "?"}}, "could not convert string to float: '?'"),
        ({"removed": None}, "'NoneType' object is not iterable"),
    ],
)
def test_invalid_step(folder, change, reason):
    path = folder.path / "00" / "step.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"step\.json is damaged: {re.escape(reason)}; delete"):
        folder.load()


def test_invalid_random_state(folder):
    save_tensors({"weight": torch.zeros(3)}, folder.path / "00" / "random_state.safetensors")
    with pytest.raises(ValueError, match=r"random_state\.safetensors is damaged"):
        folder.restore_random_state(0)


@pytest.mark.parametrize("name", ["step.json", "statistics.safetensors", "model.safetensors", "random_state.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", pickle.dumps({"score": 1.0})])
def test_damaged_file_is_named_and_never_unpickled(folder, name, content):
    (folder.path / "00" / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        folder.load(), folder.load_weights(0, nn.Linear(2, 3)), folder.restore_random_state(0)
