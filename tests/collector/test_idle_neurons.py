"""Idle neurons against a plain reading of the inputs."""

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy import IdleNeurons, SiteStatistics, Statistics, find_idle_neurons


def test_idle_neurons_are_those_whose_inputs_have_one_sign(drawn):
    torch.manual_seed(drawn.randrange(1000))
    x = torch.randn(20, 30) + torch.randint(-1, 2, (30,)) * 5
    with fe.collect(model := nn.Sequential(nn.GELU())) as collector:
        model(x)
    found = find_idle_neurons(collector.compute())["0"]
    assert found.neurons == 30
    assert found.never_on == tuple(index for index in range(30) if all(value <= 0 for value in x[:, index]))
    assert found.never_off == tuple(index for index in range(30) if all(value >= 0 for value in x[:, index]))
    assert found.never_on
    assert found.never_off


def test_zero_fits_both_states_and_unseen_neurons_none():
    counts = torch.tensor([[0, 3, 2], [2, 3, 0], [0, 3, 0], [0, 0, 0], [1, 0, 1]])
    assert find_idle_neurons(Statistics({"a": SiteStatistics("relu", counts)})) == {"a": IdleNeurons(5, (1, 2), (0,))}


def test_table_has_a_row_for_each_site():
    counts = torch.tensor([[4, 0, 0], [0, 0, 4], [2, 0, 2]])
    sites = {name: SiteStatistics("relu", counts) for name in ("layer1.relu", "layer2.relu")}
    lines = str(find_idle_neurons(Statistics(sites))).splitlines()
    assert [line.split() for line in lines[2:4]] == [["layer1.relu", "3", "1", "1"], ["layer2.relu", "3", "1", "1"]]
    assert lines[-1] == "4 neurons of 6 never changed their state"
    assert str(find_idle_neurons(Statistics({}))).endswith("0 neurons of 0 never changed their state")


def test_anything_but_statistics_is_refused():
    with pytest.raises(TypeError, match=r"statistics: got a dict, expected Statistics"):
        find_idle_neurons({})
