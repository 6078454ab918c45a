import re

import pytest
import torch
from torch import nn

from fastentropy import find_sites, isolate, linearize
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


def test_linearize_names_the_other_places_of_a_shared_module():
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Linear(2, 2), relu, nn.Sequential(relu))
    with pytest.raises(ValueError, match=r"'0' in several places: it is also '2', '3\.0', which .* fe\.isolate\(model"):
        linearize(model, ["0"])
    isolated = isolate(model, (torch.zeros(1, 2),))
    linearize(isolated, ["0"])
    assert [type(isolated[index]) for index in (0, 2)] == [nn.Identity, nn.ReLU]


OF_A_CALL = ": a call without a module of its own, which fe.isolate(model, example_inputs) makes"


class Block(nn.Module):
    """Calls one activation twice, and another one as a function."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second, self.gelu = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.GELU()

    def forward(self, x):
        return self.gelu(torch.relu(self.relu(self.second(self.relu(self.first(x))))))


def test_linearize_warns_of_a_module_that_is_called_in_several_places():
    model = nn.Sequential(Block())
    with pytest.warns(UserWarning, match=r"^Block\.forward calls '0\.relu' in 2 places, and it is the identity in all of them"):
        linearize(model, ["0.relu", "0.gelu"])
    assert type(model[0].relu) is nn.Identity


def test_linearize_does_not_warn_of_an_isolated_call(recwarn):
    linearize(isolate(nn.Sequential(Block()), (torch.zeros(1, 3),)), ["0.relu", "0.gelu"])
    assert not recwarn


@pytest.mark.parametrize(
    ("name", "explanation"),
    [
        (
            "0.relu:1",
            f"{OF_A_CALL}; the nearest are 0.relu",
        ),
        (
            "0.relu_1",
            f"{OF_A_CALL}; the nearest are 0.relu",
        ),
        ("0.second", ": it is a Linear; the nearest are 0.relu, 0.gelu"),
        ("0", ": it is a Block; the nearest are 0.relu, 0.gelu"),
        ("0.rellu", "; the nearest are 0.relu, 0.gelu"),
    ],
)
def test_unknown_names_are_explained(name, explanation):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name!r} is not an activation module of the model{explanation}')}"):
        linearize(nn.Sequential(Block()), [name])


def test_a_name_from_before_isolation_is_told_as_it_is_now():
    model = nn.Sequential(Block())
    isolated = isolate(model, (torch.zeros(1, 3),))
    before, after = ([site.name for site in find_sites(each, (torch.zeros(1, 3),))] for each in (model, isolated))
    assert before[1] not in after
    with pytest.raises(ValueError, match=f"since fe.isolate its name is '{re.escape(after[1])}'$"):
        linearize(isolated, [before[1]])
