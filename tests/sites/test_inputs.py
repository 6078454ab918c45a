"""What functions take as example inputs and as a model, and the one line that they raise for anything else."""

import collections
import pathlib

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastentropy as fe
from fastentropy.fusion.latency import measure_latency
from tests._helpers.snapshots import assert_unchanged, snapshot


class Masked(nn.Module):
    """A network with a positional, an optional and a keyword-only input."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x, mask=None, *, scale=1.0):
        y = self.last(self.relu(self.first(x)))
        return scale * (y if mask is None else y * mask)


X, MASK = torch.randn(7, 6), torch.ones(7, 1)
Pair = collections.namedtuple("Pair", ["x", "mask"])


def latency(model, inputs):
    return measure_latency(model, inputs, ["relu"])


def prune(model, inputs):
    functions = {"train": lambda m: None, "evaluate": lambda m: 1.0, "calibrate": lambda m: m(X)}
    return fe.prune(model, **functions, example_inputs=inputs, max_removed=1).removed


#: Each function that takes example inputs, and the call that its message shows for a tensor.
TAKERS = {
    "fe.find_sites(model, (x,))": fe.find_sites,
    "fe.isolate(model, (x,))": fe.isolate,
    "fe.fuse(model, (x,))": fe.fuse,
    "measure_latency(model, (x,), sites)": latency,
    "fe.prune(model, example_inputs=(x,), …)": prune,
}
takers = pytest.mark.parametrize(("call", "take"), TAKERS.items(), ids=lambda value: getattr(value, "__name__", ""))


def refusal(kind, function, *arguments):
    """Return the message of the error that a call raises, which must be one line."""
    with pytest.raises(kind) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "inputs",
    [
        (X, MASK),
        [X, MASK],
        Pair(X, MASK),
        {"x": X, "mask": MASK},
        {"mask": MASK, "x": X},
        {"x": X, "scale": 0.5},
        transformers.BatchEncoding({"x": X, "mask": MASK}),
        collections.OrderedDict(x=X),
        collections.ChainMap({"x": X}, {"mask": MASK}),
    ],
    ids=lambda inputs: type(inputs).__name__,
)
def test_tuples_lists_and_mappings(inputs):
    model = Masked()
    before = snapshot(model)
    assert [site.name for site in fe.find_sites(model, inputs)] == ["relu"]
    assert isinstance(fe.isolate(model, inputs).relu, nn.ReLU)
    assert prune(model, inputs) == ("relu",)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (torch.zeros(1, 3, 224, 224), "got a tensor of shape [1, 3, 224, 224], expected a tuple of the model's inputs: {}"),
        (torch.tensor(2.0), "got a tensor of shape [], expected a tuple of the model's inputs: {}"),
        (None, "got None, expected a tuple of the model's inputs, or a mapping of them by name: {}"),
        (3, "got 3, expected a tuple of the model's inputs, or a mapping of them by name: {}"),
        ("cat.jpg", "got the string 'cat.jpg', expected a tuple of the model's inputs, or a mapping of them by name: {}"),
        (pathlib.PurePosixPath("a/b"), "got the path 'a/b', expected a tuple of the model's inputs"),
        (np.zeros((2, 6)), "got an array of shape [2, 6], expected a tuple of the model's inputs"),
        (X.shape, "got the shape [7, 6], expected a tuple of the model's inputs, or a mapping of them by name: "),
        (DataLoader(TensorDataset(X)), "got a DataLoader, expected a tuple of the model's inputs, or a mapping of them by "),
        ((x for x in X), "got a generator, expected a tuple"),
        ({0: X}, "got a mapping with the key 0, expected the names of the model's inputs as keys"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@takers
def test_other_inputs_are_refused_in_one_line(call, take, given, text):
    model = Masked().eval()
    before = snapshot(model)
    message = refusal(TypeError, take, model, given)
    assert message.startswith(f"example_inputs: {text.format(call)}")
    assert call.partition("(model")[0] in message
    assert_unchanged(model, before)


def test_shown_call_for_a_loader_and_for_a_shape():
    loader = DataLoader(TensorDataset(X))
    assert refusal(TypeError, fe.find_sites, Masked(), loader).endswith(
        "take one batch, x = next(iter(…)), then fe.find_sites(model, (x,))"
    )
    assert refusal(TypeError, fe.find_sites, Masked(), X.shape).endswith("fe.find_sites(model, (torch.randn([7, 6]),))")


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), "got 0 positional inputs, but {}: missing a required argument: 'x'"),
        ((X, MASK, 1.0), "got 3 positional inputs, but {}: too many positional arguments"),
        ({"mask": MASK}, "got the keywords mask, but {}: missing a required argument: 'x'"),
        (
            {"x": X, "ids": X},
            "got the keywords x, ids, but {}: got an unexpected keyword argument 'ids'",
        ),
    ],
)
@takers
def test_inputs_that_the_model_does_not_take(call, take, inputs, text):
    model = Masked().train(take not in (fe.fuse, latency))
    before = snapshot(model)
    kind, start = (TypeError, "example_inputs") if model.training else (ValueError, "the model does not run on example_inputs")
    assert refusal(kind, take, model, inputs) == f"{start}: {text.format('Masked takes (x, mask=…, scale=…)')}"
    assert_unchanged(model, before)
    with fe.collect(model) as collector:  # no collector was left attached
        model(X)
    assert collector.compute()["relu"].observations == 35


@pytest.mark.parametrize("inputs", [{"x": [[1, 2]]}, ([1.0, 2.0],), (np.zeros((2, 6)),)], ids=["encoding", "list", "array"])
@pytest.mark.parametrize("take", [fe.find_sites, fe.isolate])
def test_inputs_without_a_tensor(take, inputs):
    text = refusal(TypeError, take, Masked(), inputs)
    assert text.startswith("example_inputs: got no tensor (linear(): argument 'input'")
    assert text.endswith("; a tokenizer returns tensors with return_tensors='pt'")
    assert "got no tensor" in refusal(ValueError, fe.fuse, Masked().eval(), inputs)


def test_mapping_that_is_itself_an_input():
    class TakesMapping(nn.Module):
        def forward(self, batch):
            return batch["x"].relu()

    with pytest.raises(TypeError, match=r"but TakesMapping takes \(batch\).*itself an input as \(inputs,\)$"):
        fe.find_sites(TakesMapping(), {"x": X})
    assert len(fe.find_sites(TakesMapping(), ({"x": X},))) == 1


def test_inputs_that_a_hook_changes():
    """A hook may turn inputs that the forward does not take into others."""
    model = Masked()
    model.register_forward_pre_hook(lambda module, args, kwargs: ((kwargs.pop("batch"),), kwargs), with_kwargs=True)
    assert [site.name for site in fe.find_sites(model, {"batch": X})] == ["relu"]


def test_other_type_errors_stay_as_they_are():
    class Adds(nn.Module):
        def forward(self, x):
            return x + "text"

    with pytest.raises(TypeError, match="unsupported operand"):
        fe.find_sites(Adds(), (X,))


def test_inputs_that_record_gradients():
    x = torch.randn(7, 6, requires_grad=True) * 2
    before = x.clone()
    assert len(fe.find_sites(Masked(), {"x": x})) == 1
    assert torch.equal(x, before)
    assert x.requires_grad


class Pipeline:
    model = nn.ReLU()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (None, "got None, expected a torch.nn.Module"),
        (Masked, "got the class Masked, expected a module: Masked(…)"),
        (dict, "got the class dict, expected a torch.nn.Module"),
        ("model.pt2", "got the string 'model.pt2', expected a torch.nn.Module: load the model first"),
        (pathlib.PurePosixPath("model.pt"), "got the path 'model.pt', expected a torch.nn.Module: load the model first"),
        (torch.relu, "got a builtin_function_or_method, expected a torch.nn.Module"),
        (nn.Linear(2, 2).state_dict(), "got an OrderedDict, expected a torch.nn.Module: build the model"),
        (Pipeline(), "got a Pipeline, expected a torch.nn.Module: its attribute .model"),
        (torch.export.export(nn.ReLU(), (X,)), "got an ExportedProgram, expected the torch.nn.Module that was exported"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: fe.find_sites(model, (X,)),
        lambda model: fe.isolate(model, (X,)),
        lambda model: prune(model, (X,)),
        lambda model: fe.fuse(model, (X,)),
        lambda model: latency(model, (X,)),
        lambda model: fe.linearize(model, ["0"]),
        fe.collect,
    ],
)
def test_other_things_than_a_model(use, model, text):
    assert refusal(TypeError, use, model).startswith(f"model: {text}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train": None}, "train: got None, expected a function that is called as train(model)"),
        ({"evaluate": 0.9}, "evaluate: got 0.9, expected a function that is called as evaluate(model)"),
        (
            {"calibrate": DataLoader(TensorDataset(X))},
            "calibrate: got a DataLoader, expected a function that is called as calibrate(model)",
        ),
        ({"measure": X}, "measure: got a tensor of shape [7, 6], expected a function that is called as measure(model)"),
        ({"on_step": "print"}, "on_step: got the string 'print', expected a function that is called as on_step(steps)"),
        (
            {"statistics": "a.safetensors"},
            "statistics: got the string 'a.safetensors', expected Statistics: fe.Statistics.load(path)",
        ),
        ({"protect": 3}, "protect: got 3, expected a list of site names"),
    ],
)
def test_other_things_than_the_functions_of_prune(options, text):
    functions = {"train": lambda m: None, "evaluate": lambda m: 1.0, "calibrate": lambda m: m(X)}
    assert refusal(TypeError, lambda: fe.prune(Masked(), **{**functions, **options}, example_inputs=(X,))).startswith(text)


@pytest.mark.parametrize(
    ("argument", "use"),
    [
        ("names", fe.linearize),
        (
            "protect",
            lambda model, sites: fe.prune(model, train=id, evaluate=id, calibrate=id, example_inputs=(X,), protect=sites),
        ),
    ],
)
def test_sites_in_place_of_their_names(argument, use):
    model = Masked()
    before = snapshot(model)
    text = refusal(TypeError, use, model, fe.find_sites(model, (X,)))
    assert text == f"{argument}: got a Site, expected a list of site names: [site.name for site in sites]"
    assert_unchanged(model, before)
