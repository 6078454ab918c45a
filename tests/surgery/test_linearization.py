import pytest
from torch import nn

from fastentropy import linearize
from tests._helpers.snapshots import assert_unchanged, snapshot


def test_linearize_replaces_just_the_named_modules(network):
    network.eval()
    linearize(network, ["relu2"])
    assert type(network.relu2) is nn.Identity
    assert (type(network.relu1), type(network.gelu)) == (nn.ReLU, nn.GELU)
    assert not network.relu2.training


def test_linearize_names_the_nearest_sites_and_changes_nothing(network):
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"'rellu2' is not an activation module of the model; the nearest are relu2, relu1"):
        linearize(network, ["relu1", "rellu2"])
    assert_unchanged(network, before)


def test_linearize_refuses_a_model_that_is_itself_an_activation():
    with pytest.raises(ValueError, match="the model is itself an activation"):
        linearize(nn.ReLU(), [""])


def test_linearize_refuses_a_string(network):
    with pytest.raises(ValueError, match=r"\['relu1'\]"):
        linearize(network, "relu1")


def test_linearize_refuses_a_module_that_stands_in_two_places():
    relu = nn.ReLU()
    with pytest.raises(ValueError, match="several places"):
        linearize(nn.Sequential(relu, nn.Linear(2, 2), relu), ["0"])
