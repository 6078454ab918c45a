"""A monitor in real runs of Lightning's Trainer."""

import csv
import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastentropy as fe
from tests._helpers.invisibility import import_all, mechanism
from tests.monitoring.loops import FEATURES, LABELS, BrokenError, Network, expected, read_events, read_lines

pytestmark = pytest.mark.slow  # lightning takes seconds to import

lightning = pytest.importorskip("lightning")
loggers = pytest.importorskip("lightning.pytorch.loggers")


def classifier(network, library):
    """Return a module that trains a network, and that leaves it in training mode after validation."""

    class Classifier(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def training_step(self, batch, index):
            return self.network(*batch)["loss"]

        def validation_step(self, batch, index):
            self.network(*batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.001)

    return Classifier()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def fit(network, folder, monitor=None, logger=False, library=lightning, **options):
    """Fit a network in 7 steps, and validate it after every batch."""
    torch.manual_seed(5)
    trainer = library.Trainer(
        max_steps=7, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, val_check_interval=1, log_every_n_steps=1,
        callbacks=[monitor.lightning_callback()] if monitor else [], **options,
    )  # fmt: skip
    module = network if isinstance(network, library.LightningModule) else classifier(network, library)
    data = TensorDataset(FEATURES, LABELS)
    trainer.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 24))


@pytest.mark.parametrize("passes", [1, 3])
def test_steps_that_are_due_are_written(passes, tmp_path):
    network, path = Network(), tmp_path / "lines"
    monitor = fe.EntropyMonitor(network, every=3, writers=[fe.json_lines_writer(path)])
    fit(network, tmp_path, monitor, accumulate_grad_batches=passes)
    assert len(network.inputs[1]) == 7 * passes
    assert read_lines(path) == {step: pytest.approx(expected(network, step, passes), abs=1e-12) for step in (0, 3, 6)}


def test_loggers_of_the_trainer_get_the_figures(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    network = Network()
    made = [loggers.TensorBoardLogger(tmp_path, "events", ""), loggers.CSVLogger(tmp_path, "rows", "")]
    fit(network, tmp_path, fe.EntropyMonitor(network, every=3), made)
    written = {step: expected(network, step) for step in (0, 3, 6)}
    events = read_events(tmp_path / "events")
    assert {step: {tag: values[tag] for tag in expected(network, 0)} for step, values in events.items()} == {
        step: pytest.approx(figures, abs=1e-6) for step, figures in written.items()
    }
    with (tmp_path / "rows" / "metrics.csv").open(newline="") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    assert {step: {key: float(row[key]) for key in written[step]} for step, row in rows.items()} == {
        step: pytest.approx(figures, abs=1e-12) for step, figures in written.items()
    }


def test_training_learns_alike(tmp_path):
    plain, watched = Network(), Network()
    fit(plain, tmp_path)
    fit(watched, tmp_path, fe.EntropyMonitor(watched, every=2))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_whole_module_may_be_measured(tmp_path):
    module, path = classifier(Network(), lightning), tmp_path / "lines"
    fit(module, tmp_path, fe.EntropyMonitor(module, every=3, writers=[fe.json_lines_writer(path)]))
    figures = {key.replace("/", "/network."): value for key, value in expected(module.network, 3).items()}
    assert read_lines(path)[3] == pytest.approx(figures, abs=1e-12)


def test_training_that_raises_leaves_nothing(tmp_path):
    network = Network(breaks_at=3)
    import_all()
    before = mechanism()
    with pytest.raises(BrokenError):
        fit(network, tmp_path, fe.EntropyMonitor(network, every=2))
    assert mechanism() == before


def test_trainer_of_pytorch_lightning(tmp_path):
    library = pytest.importorskip("pytorch_lightning")
    network, path = Network(), tmp_path / "lines"
    fit(network, tmp_path, fe.EntropyMonitor(network, every=3, writers=[fe.json_lines_writer(path)]), library=library)
    assert read_lines(path) == {step: pytest.approx(expected(network, step), abs=1e-12) for step in (0, 3, 6)}
