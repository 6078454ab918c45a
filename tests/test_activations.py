import pytest
from torch import nn

from fastentropy.activations import ACTIVATIONS, activation_modules, activation_name


@pytest.mark.parametrize(("kind", "name"), ACTIVATIONS.items())
def test_every_activation_of_the_table_is_known_by_its_own_name(kind, name):
    assert activation_name(kind()) == name


def test_subclass_counts_as_its_nearest_ancestor():
    class Clipped(nn.ReLU6):  # a Hardtanh too
        pass

    assert activation_name(Clipped()) == "relu6"


@pytest.mark.parametrize("module", [nn.Identity(), nn.Sigmoid(), nn.Tanh(), nn.Linear(2, 2)])
def test_other_modules_are_not_activations(module):
    assert activation_name(module) is None


def test_modules_come_by_their_first_path():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), nn.Sequential(shared, nn.GELU()))
    assert list(activation_modules(model)) == ["0", "2.1"]


def test_a_model_without_activations_is_told_what_is_known():
    with pytest.raises(ValueError, match=r"Linear has no known activation module.*ReLU"):
        activation_modules(nn.Linear(2, 2))
