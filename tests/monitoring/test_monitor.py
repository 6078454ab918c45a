"""A monitor measures the steps that are due, and only these, and leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastentropy as fe
from tests._helpers.invisibility import import_all, mechanism
from tests._helpers.snapshots import snapshot
from tests.monitoring.loops import FEATURES, BrokenError, Network, expected, train


def recorded():
    """Return a dict for the figures that are written, by step, and the writer that fills it."""
    written = {}
    return written, lambda figures, step: written.__setitem__(step, figures)


@pytest.mark.parametrize("passes", [1, 3])
def test_figures_are_those_of_the_steps_that_are_due(passes):
    model, (written, write) = Network(), recorded()
    train(model, fe.EntropyMonitor(model, every=3, writers=[write]), steps=7, passes=passes)
    assert list(written) == [0, 3, 6]
    for step, figures in written.items():
        assert figures == pytest.approx(expected(model, step, passes), abs=1e-12)
        assert min(figures["dead/layers.1"], figures["always_on/layers.1"]) >= 1 / 5
    assert all(max(figures[f"entropy/layers.{layer}"] for figures in written.values()) > 0.01 for layer in (1, 3))


def test_latest_statistics_hold_the_values_of_one_step():
    model = Network()
    monitor = fe.EntropyMonitor(model, every=2)
    assert monitor.latest is None
    train(model, monitor, steps=3)
    assert {name: site.observations for name, site in monitor.latest.items()} == {"layers.1": 4 * 5, "layers.3": 4 * 6}


def test_training_learns_alike():
    plain, watched = Network(), Network()
    train(plain)
    train(watched, fe.EntropyMonitor(watched, every=2))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_collector_is_attached_only_in_steps_that_are_due():
    model = Network()
    monitor = fe.EntropyMonitor(model, every=2)
    import_all()
    before, changed = mechanism(), []
    for _ in range(4):
        with monitor.step():
            changed.append(mechanism() != before)
            model(FEATURES)
        assert mechanism() == before
    assert changed == [True, False, True, False]


def test_every_writer_gets_figures_of_its_own():
    (first, write_first), (second, write_second) = recorded(), recorded()

    def write_and_clear(figures, step):
        write_first(dict(figures), step)
        figures.clear()

    model = Network()
    train(model, fe.EntropyMonitor(model, writers=[write_and_clear, write_second]), steps=1)
    assert first == second
    assert first[0]


def test_numbers_of_steps_may_be_given():
    model, (written, write) = Network(), recorded()
    monitor = fe.EntropyMonitor(model, every=10, writers=[write])
    for number in (1009, 1010, 1010, 1011, None, 1020):
        with monitor.step(number):
            model(FEATURES)
    assert list(written) == [1010, 1020]
    with monitor.step(1029):
        model(FEATURES)
    with monitor.step():
        model(FEATURES)
    assert list(written) == [1010, 1020, 1030]


def test_exception_leaves_nothing():
    model, (written, write) = Network(breaks_at=2), recorded()
    monitor = fe.EntropyMonitor(model, every=1, writers=[write])
    model(FEATURES)
    import_all()
    before, attributes = mechanism(), snapshot(model)[1:]
    with pytest.raises(BrokenError):
        train(model, monitor)
    assert mechanism() == before
    assert snapshot(model)[1:] == attributes
    assert list(written) == [0]
    assert list(monitor.latest) == ["layers.1", "layers.3"]
    model.inputs = {layer: [] for layer in model.inputs}
    train(model, monitor, steps=1)
    assert written[2] == pytest.approx(expected(model, 0), abs=1e-12)


def test_pause_leaves_passes_out():
    model, (written, write) = Network(), recorded()
    monitor = fe.EntropyMonitor(model, writers=[write])
    monitor.begin_step(0)
    model(FEATURES[:8])
    monitor.pause_step()
    model(FEATURES[8:])
    monitor.begin_step(0)
    model(FEATURES[:4])
    figures = monitor.end_step()
    assert monitor.latest["layers.1"].observations == (8 + 4) * 5
    assert written == {0: figures}
    assert monitor.end_step() is None


def test_next_step_begins_without_what_was_not_ended():
    model = Network()
    monitor = fe.EntropyMonitor(model, every=50)
    for number in (0, 50):
        monitor.begin_step(number)
        model(FEATURES)
    monitor.end_step()
    assert monitor.latest["layers.1"].observations == 24 * 5


def test_block_detaches_what_was_not_ended():
    model = Network()
    import_all()
    before, attributes = mechanism(), snapshot(model)[1:]

    def break_off():
        monitor.begin_step(0)
        model(FEATURES)
        raise BrokenError

    with pytest.raises(BrokenError), fe.EntropyMonitor(model) as monitor:
        break_off()
    assert mechanism() == before
    assert snapshot(model)[1:] == attributes
    assert monitor.end_step() is None


def test_step_without_a_pass_says_so():
    model = Network()
    other = copy.deepcopy(model)
    monitor = fe.EntropyMonitor(other)
    with pytest.raises(RuntimeError, match="nothing was counted: run the model"), monitor.step():
        model(FEATURES)


def test_model_without_activations_says_so():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="activation"), fe.EntropyMonitor(model).step():
        model(FEATURES)


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_positive(every):
    with pytest.raises(ValueError, match=f"every={every}: expected"):
        fe.EntropyMonitor(Network(), every=every)


def test_options_are_those_of_collect():
    model = Network()
    monitor = fe.EntropyMonitor(model, exclude=["layers.3"])
    train(model, monitor, steps=1)
    assert list(monitor.latest) == ["layers.1"]
    with pytest.raises(TypeError, match="exclude"):
        fe.EntropyMonitor(model, exclude="layers.3")


def test_compiled_model_is_measured_in_its_graphs():
    model, (written, write) = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), recorded()
    monitor, compiled = fe.EntropyMonitor(model, every=2, writers=[write]), torch.compile(model, backend="aot_eager")
    for number in range(7):
        with monitor.step():
            compiled(FEATURES).square().mean().backward()
        assert (monitor.latest["1"].observations, monitor.latest.notes) == (24 * 5, ())
        if number == 4:  # by now there are graphs that count and graphs that do not
            graphs = counters["stats"]["unique_graphs"]
    assert list(written) == [0, 2, 4, 6]
    assert counters["stats"]["unique_graphs"] == graphs >= 1
