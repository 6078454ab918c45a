"""What is written can be read back."""

import json
import sys
import types

import pytest

import fastentropy as fe
from tests.monitoring.loops import Network, expected, read_events, read_lines, train


def test_json_lines_are_added(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    model = Network()
    train(model, fe.EntropyMonitor(model, every=2, writers=[fe.json_lines_writer(path)]), steps=3)
    assert read_lines(path) == {step: pytest.approx(expected(model, step), abs=1e-12) for step in (0, 2)}
    fe.json_lines_writer(str(path))({"dead/relu": 0.5}, 4)
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4, "dead/relu": 0.5}
    assert len(read_lines(path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("given", ["folder", "writer"])
def test_tensorboard_reads_its_event_file(given, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    target = tmp_path if given == "folder" else tensorboard.SummaryWriter(tmp_path)
    model = Network()
    train(model, fe.EntropyMonitor(model, every=2, writers=[fe.tensorboard_writer(target)]), steps=5)
    steps = {step: pytest.approx(expected(model, step), abs=1e-6) for step in (0, 2, 4)}  # stored as float32
    assert read_events(tmp_path) == steps


def test_no_file_before_the_first_step(tmp_path):
    fe.json_lines_writer(tmp_path / "log.jsonl")
    fe.tensorboard_writer(tmp_path / "events")
    assert list(tmp_path.iterdir()) == []


class Run:
    """What a run of Weights & Biases is told."""

    def __init__(self):
        self.metrics, self.rows = {}, []

    def define_metric(self, name, step_metric=None, hidden=None):
        self.metrics[name] = step_metric

    def log(self, data):
        self.rows.append(data)


@pytest.mark.parametrize("given", ["run", "active run"])
def test_wandb_run_gets_an_axis_of_its_own(given, monkeypatch):
    run, model = Run(), Network()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run))
    write = fe.wandb_writer(run if given == "run" else None)
    train(model, fe.EntropyMonitor(model, every=2, writers=[write]), steps=3)
    assert [row.pop("monitor/step") for row in run.rows] == [0, 2]
    assert run.rows == [pytest.approx(expected(model, step), abs=1e-12) for step in (0, 2)]
    assert run.metrics == {"monitor/step": None} | dict.fromkeys(("entropy/*", "dead/*", "always_on/*"), "monitor/step")


def test_wandb_without_a_run_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None))
    with pytest.raises(RuntimeError, match=r"wandb\.init"):
        fe.wandb_writer()({"dead/relu": 0.0}, 0)


@pytest.mark.parametrize(
    ("library", "make"),
    [("torch.utils.tensorboard", lambda: fe.tensorboard_writer("events")), ("wandb", fe.wandb_writer)],
    ids=["tensorboard", "wandb"],
)
def test_missing_library_is_named(library, make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {library.split('.')[-1]}"):
        make()({"dead/relu": 0.0}, 0)
