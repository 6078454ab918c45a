"""A monitor in real runs of Hugging Face's Trainer."""

import pytest
import torch

import fastentropy as fe
from tests._helpers.invisibility import import_all, mechanism
from tests.monitoring.loops import FEATURES, LABELS, BrokenError, Network, expected, read_events, read_lines

pytestmark = pytest.mark.slow  # transformers takes seconds to import

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

DATA = [{"features": features, "labels": label} for features, label in zip(FEATURES, LABELS, strict=True)]


def trainer(model, folder, monitor=None, **options):
    """Return a Trainer of 7 steps that evaluates after every step."""
    arguments = transformers.TrainingArguments(
        str(folder / "trainer"), use_cpu=True, report_to="none", max_steps=7, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, eval_strategy="steps", eval_steps=1, logging_steps=100, remove_unused_columns=False,
        learning_rate=0.001, **options,
    )  # fmt: skip
    callbacks = [monitor.huggingface_callback()] if monitor else []
    made = transformers.Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=callbacks)
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.mark.parametrize("passes", [1, 3])
def test_tensorboard_has_the_steps_that_are_due(passes, tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    model = Network()
    writers = [fe.tensorboard_writer(tmp_path / "events"), fe.json_lines_writer(tmp_path / "lines")]
    monitor = fe.EntropyMonitor(model, every=3, writers=writers)
    trainer(model, tmp_path, monitor, gradient_accumulation_steps=passes).train()
    # An epoch has 6 batches, so no step has fewer.
    assert len(model.inputs[1]) == 7 * passes
    written = {step: expected(model, step, passes) for step in (0, 3, 6)}
    assert read_events(tmp_path / "events") == {step: pytest.approx(figures, abs=1e-6) for step, figures in written.items()}
    assert read_lines(tmp_path / "lines") == {step: pytest.approx(figures, abs=1e-12) for step, figures in written.items()}


def test_training_learns_alike(tmp_path):
    plain, watched = Network(), Network()
    trainer(plain, tmp_path).train()
    trainer(watched, tmp_path, fe.EntropyMonitor(watched, every=2)).train()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_step_numbers_go_on_from_a_checkpoint(tmp_path):
    model, path = Network(), tmp_path / "lines"
    monitor = fe.EntropyMonitor(model, every=2, writers=[fe.json_lines_writer(path)])
    first = trainer(model, tmp_path, monitor)
    first.args.save_strategy, first.args.save_steps, first.args.max_steps = transformers.IntervalStrategy.STEPS, 3, 3
    first.train()
    trainer(model, tmp_path, monitor).train(resume_from_checkpoint=True)
    assert list(read_lines(path)) == [0, 2, 4, 6]
    assert read_lines(path)[4] == pytest.approx(expected(model, 4), abs=1e-12)


def test_training_that_raises_leaves_nothing(tmp_path):
    model = Network(breaks_at=3)
    monitor = fe.EntropyMonitor(model, every=2)
    import_all()
    before = mechanism()
    with pytest.raises(BrokenError), monitor:
        trainer(model, tmp_path, monitor).train()
    assert mechanism() == before


def test_training_may_begin_again_after_it_raised(tmp_path):
    model, path = Network(breaks_at=3), tmp_path / "lines"
    monitor = fe.EntropyMonitor(model, every=2, writers=[fe.json_lines_writer(path)])
    import_all()
    before, running = mechanism(), trainer(model, tmp_path, monitor)
    with pytest.raises(BrokenError):
        running.train()
    model.inputs = {layer: [] for layer in model.inputs}
    running.train()
    assert mechanism() == before
    assert read_lines(path)[2] == pytest.approx(expected(model, 2), abs=1e-12)
