"""Graphs share equal tensors; a graph holds no tensor twice."""

import gc
import weakref

import torch

from fastentropy.fusion.shared_tensors import SharedTensors


def test_equal_tensor_is_shared():
    one = torch.randn(3, 4)
    known = SharedTensors([one])
    assert known.shared(one.clone()) is one
    assert known.shared(one + 1) is not one


def test_tensor_is_known_from_its_first_use_on():
    known, one = SharedTensors(), torch.randn(5)
    assert known.shared(one) is one
    assert known.shared(one.clone()) is one


def test_other_layouts_are_not_shared():
    one = torch.ones(3, 4)
    known = SharedTensors([one])
    others = (torch.ones(4, 3), torch.ones(4, 3).T, torch.ones(3, 4, dtype=torch.float64), torch.ones(3, 4, device="meta"))
    assert all(known.shared(other) is other for other in others)


def test_graph_holds_each_storage_once():
    one = torch.randn(4)
    known, taken = SharedTensors([one]), set()
    assert known.shared(one.clone(), taken) is one
    second, third = known.shared(one, taken), known.shared(one[:], taken)
    addresses = {value.data_ptr() for value in (one, second, third)}
    assert len(addresses) == 3
    assert torch.equal(second, one)
    assert torch.equal(third, one)
    other_graph = set()
    assert {known.shared(one.clone(), other_graph).data_ptr() for _ in range(3)} == addresses


def test_known_tensors_are_not_kept_alive():
    known, one = SharedTensors(), torch.randn(4)
    known.shared(one)
    alive = weakref.ref(one)
    del one
    gc.collect()
    assert alive() is None
