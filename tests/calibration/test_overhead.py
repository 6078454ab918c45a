import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.calibration import overhead
from fastentropy.calibration.overhead import RUN_TWICE, Overhead


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()


def batches(number):
    return torch.randn(number, 5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("number", [1, 3, 4, 9, 200])
def test_batches_run_twice_count_once(model, number):
    runs = []
    with torch.no_grad(), fe.collect(model) as collector:
        measured = Overhead(collector)
        for batch in batches(number):
            measured.run(lambda batch=batch: runs.append(model(batch)))
    with torch.no_grad(), fe.collect(model) as by_hand:
        for batch in batches(number):
            model(batch)
    assert torch.equal(collector.compute()["1"].counts, by_hand.compute()["1"].counts)
    twice = sum(batch in RUN_TWICE or batch % RUN_TWICE[-1] == 0 for batch in range(1, number + 1))
    assert (measured.samples, len(runs)) == (twice, number + twice + (twice > 0))  # one more before the first measurement
    assert (measured.ratio is None) == (number < RUN_TWICE[0])
    assert (measured.plain_seconds > 0) == (number >= RUN_TWICE[0])


def test_first_batches_of_a_shape_are_not_measured(model, monkeypatch):
    monkeypatch.setattr(overhead, "RUN_TWICE", (1,))
    with fe.collect(model) as collector:
        measured = Overhead(collector)
        measured_batches = []
        for shape in ("a", "a", "b", "a", "b", "c", "d", "c"):
            before = measured.samples
            measured.run(lambda: None, shape)
            measured_batches.append(measured.samples - before)
    assert measured_batches == [0, 1, 0, 1, 1, 0, 1, 1]  # from the fourth shape on nothing is compiled


def test_order_alternates(model, monkeypatch):
    monkeypatch.setattr(overhead, "RUN_TWICE", (2, 3, 4, 5))
    order = []
    with fe.collect(model) as collector:
        measured = Overhead(collector)
        for _ in range(5):
            measured.run(lambda: order.append(collector._watcher.is_attached))
    assert order == [True, False, *[False, True, True, False] * 2]


@pytest.mark.parametrize("batch", [1, 4])
def test_collector_is_attached_again_after_an_error(model, batch):
    runs = []

    def forward():
        runs.append(1)
        if len(runs) == batch:
            raise RuntimeError("out of memory")

    with torch.no_grad(), fe.collect(model) as collector:
        measured = Overhead(collector)
        for _ in range(batch - 1):
            measured.run(forward)
        with pytest.raises(RuntimeError, match="out of memory"):
            measured.run(forward)
        model(batches(1)[0])
    assert collector.compute()["1"].observations == 5 * 3
    assert "forward" not in vars(model)


def test_ratio_is_the_median_of_the_last(model, monkeypatch):
    monkeypatch.setattr(overhead, "RUN_TWICE", (1,))
    monkeypatch.setattr(overhead, "MAX_RATIOS", 5)
    with fe.collect(model) as collector:
        times = {False: iter([50.0, *[1.0] * 7]), True: iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0])}
        monkeypatch.setattr(overhead, "measure_seconds", lambda forward: next(times[collector._watcher.is_attached]))
        measured = Overhead(collector)
        for _ in range(8):
            measured.run(lambda: None)
    assert (measured.ratio, measured.samples, measured.plain_seconds) == (3, 7, 7)
