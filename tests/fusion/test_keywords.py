"""Networks whose inputs are given by name are fused, called, saved and refused like those with positional inputs."""

import collections
import copy
import itertools
import json
import random
import zipfile

import pytest
import torch
import transformers
from torch import nn

import fastentropy as fe
from fastentropy.fusion.latency import measure_latency

pytestmark = pytest.mark.usefixtures("counted_times")


class Masked(nn.Module):
    """A network with positional, optional and keyword-only inputs, the batch of which may be in any of them."""

    def __init__(self, features=6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(features, 8), nn.Linear(8, features)
        self.relu, self.last = nn.ReLU(), nn.Linear(features, 3)

    def forward(self, x, mask=None, *, table=None, options=None, scale=1.0, **others):
        y = self.second(self.first(x))
        if mask is not None:
            y = y * mask
        if table is not None:
            y = y @ table
        if options is not None:
            y = y + options["shift"]["by"] * options["times"][1]
        for other in others.values():
            y = y - other
        return self.last(self.relu(y)) * scale


def inputs_of(batch):
    """Return random inputs of the network by name, for a batch of this size."""
    return {
        "x": torch.randn(batch, 6),
        "mask": torch.rand(batch, 1),
        "table": torch.randn(6, 6),
        "options": {"times": [2, torch.randn(batch, 1)], "shift": {"by": torch.randn(batch, 6)}},
        "scale": 0.5,
        "others": None,
        "bias": torch.randn(batch, 6),
    }


#: Names of the inputs that are given, in order. The batch is not in the first of them everywhere.
GIVEN = [
    ("x",),
    ("x", "mask"),
    ("mask", "x"),
    ("table", "x"),
    ("scale", "x", "mask"),
    ("bias", "x", "scale"),
    ("options", "x"),
    ("table", "bias", "scale", "options", "x", "mask"),
]


def selected(names, batch):
    given = inputs_of(batch)
    return {name: given[name] for name in names}


def shuffled(inputs):
    """Return a mapping with another order of its keys, and of those of nested mappings."""
    keys = random.sample(list(inputs), len(inputs))
    return {key: shuffled(inputs[key]) if isinstance(inputs[key], dict) else inputs[key] for key in keys}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", GIVEN, ids=", ".join)
@pytest.mark.parametrize("batch", [1, 4])
def test_keywords_in_any_order_and_batch(names, batch):
    model = Masked().eval()
    fused = fe.fuse(model, selected(names, batch))
    assert fused.report.chains[0].choice == "merge"
    for size in (1, 2, 3, 37):
        inputs = selected(names, size)
        close(fused(**shuffled(inputs)), model(**inputs))


def test_positional_and_keyword_inputs_mixed():
    model = Masked().eval()
    by_name, by_position = (
        fe.fuse(model, selected(("mask", "x", "scale"), 4)),
        fe.fuse(model, tuple(selected(("x", "mask"), 4).values())),
    )
    x, mask, expected = torch.randn(5, 6), torch.rand(5, 1), None
    expected = model(x, mask, scale=0.5)
    for actual in (
        by_name(x, mask, scale=0.5),
        by_name(x, mask=mask, scale=0.5),
        by_name(scale=0.5, x=x, mask=mask),
        by_name(x, mask, scale=0.5, options=None),
    ):
        close(actual, expected)
    expected = model(x, mask)
    for actual in (
        by_position(x, mask),
        by_position(x, mask=mask),
        by_position(mask=mask, x=x),
        by_position(x, mask, scale=1.0),
        by_position(x, mask, table=None),
    ):
        close(actual, expected)


def test_other_classes_of_mappings_and_sequences():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

        def forward(self, pair, tables, flag=True):
            return self.layers(pair[0]) + pair[1] - tables["shift"] * tables["scale"]

    def inputs(batch, sequence, mapping):
        tensors = {"scale": torch.randn(batch, 1), "shift": torch.randn(batch, 6)}
        return {"pair": sequence(torch.randn(batch, 6), torch.randn(batch, 1)), "tables": mapping(tensors)}

    def defaults(values):
        return collections.defaultdict(float, values)

    def reverse(values):
        return dict(reversed(values.items()))

    Pair = collections.namedtuple("Pair", ["x", "y"])
    sequences = [Pair, lambda *values: values, lambda *values: list(values)]
    mappings = [dict, reverse, collections.OrderedDict, defaults]
    model = Nested().eval()
    for sequence, mapping in zip([*sequences, Pair], mappings, strict=True):
        fused = fe.fuse(model, inputs(4, sequence, mapping), measure=False)
        for other_sequence, other_mapping in itertools.product(sequences, mappings):
            given = inputs(3, other_sequence, other_mapping)
            close(fused(**given), model(**given))
            close(fused(given["pair"], given["tables"], True), model(**given))


def test_constant_inputs_that_equal_their_defaults_may_be_left_out():
    model = Masked().eval()
    fused, x = fe.fuse(model, {"x": torch.randn(4, 6), "mask": None, "scale": 1.0}), torch.randn(3, 6)
    for actual in (fused(x), fused(x, None), fused(x=x, mask=None), fused(x, scale=1.0)):
        close(actual, model(x))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (0, ("x",), "this model was fused for the inputs x, mask: mask is missing; fuse it again for other inputs"),
        (0, (), "this model was fused for the inputs x, mask: x, mask are missing"),
        (0, ("x", "mask", "table"), "this model was fused for the inputs x, mask: table is not among them"),
        (0, ("x", "table"), "this model was fused for the inputs x, mask: mask is missing and table is not among them"),
        (2, ("mask",), "the input 'mask' is given twice, by its position and by its name"),
        (2, ("scale",), "this model was fused for the inputs x, mask: scale is not among them"),
        (3, (), "this model was fused for the inputs x, mask: [2] is not among them"),
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_other_inputs_are_refused_in_one_line(args, kwargs, text, by_name):
    example = selected(("x", "mask"), 4)
    fused = fe.fuse(Masked().eval(), example if by_name else tuple(example.values()), measure=False)
    given = inputs_of(3)
    with pytest.raises(ValueError, match=r"this model|given twice") as raised:
        fused(*[given["x"], given["mask"], given["mask"]][:args], **{name: given[name] for name in kwargs})
    if by_name or kwargs:
        assert str(raised.value).startswith(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"x": torch.randn(3, 5)},
            r"^the input 'x' has shape \[3, 5\], but this model was fused for \['any', 6\]; fuse it again$",
        ),
        ({"mask": None}, "^the input 'mask' is None, but this model was fused for"),
        ({"scale": 2.0}, r"^the input 'scale' is 2.0, but this model was fused for 0\.5; fuse it again$"),
        ({"x": [torch.randn(3, 6)]}, r"^the input 'x' is a list, but"),
        ({"x": {"x": torch.randn(3, 6)}}, r"^the input 'x' is a dict \(the values of a mapping are given by .*\), but"),
        (
            {"options": {"times": [2, torch.ones(3, 1)]}},
            "^the input 'options' has the keys times, but this model was fused for times, shift",
        ),
        ({"options": {"times": [2], "shift": {"by": torch.ones(3, 6)}}}, r"^the input 'options'\['times'\] holds 1 value, but"),
        ({"options": {"times": [3, torch.ones(3, 1)], "shift": {"by": torch.ones(3, 6)}}}, "^the input 'options' is 3, but"),
        ({"options": torch.ones(3, 1)}, "^the input 'options' holds 1 value, but this model was fused for 3"),
    ],
)
def test_other_values_are_refused_by_their_name(change, text):
    names = ("x", "mask", "options", "scale")
    fused = fe.fuse(Masked().eval(), selected(names, 4), measure=False)
    with pytest.raises(ValueError, match=text) as raised:
        fused(**{**selected(names, 3), **change})
    assert "\n" not in str(raised.value)


def test_branches_on_sizes_are_guarded_by_name():
    class Branches(nn.Module):
        def forward(self, x, other, **more):
            return x * 2 if more["long"].shape[1] % 4 else x + other

    example = {"other": torch.randn(3, 1), "long": torch.randn(3, 7), "x": torch.randn(3, 1)}
    model, fused = Branches(), fe.fuse(Branches().eval(), example, dynamic_sizes=True, measure=False)
    for size in (5, 6, 9):
        inputs = {**example, "long": torch.randn(3, size)}
        close(fused(**shuffled(inputs)), model(**inputs))
    with pytest.raises(ValueError, match="may take another branch"):
        fused(**{**example, "long": torch.randn(3, 8)})


@pytest.mark.parametrize("names", [("mask", "x"), ("options", "x", "scale", "bias")], ids=", ".join)
def test_saved_loaded_and_copied_like_the_model(names, tmp_path):
    model = Masked().eval()
    fused = fe.fuse(model, selected(names, 4))
    copy.deepcopy(fused).save(tmp_path / "model.pt2")
    loaded, inputs = fe.load(tmp_path / "model.pt2"), selected(names, 7)
    assert loaded.report == fused.report
    assert torch.equal(loaded(**shuffled(inputs)), fused(**inputs))
    x = inputs.pop("x")
    assert torch.equal(loaded(x, **inputs), copy.deepcopy(fused)(x, **inputs))
    close(loaded(x, **inputs), model(x, **inputs))
    with pytest.raises(ValueError, match="x is missing"):
        loaded(**inputs)


def test_file_without_a_signature(tmp_path):
    """Files of older versions hold no signature."""
    model = Masked().eval()
    fe.fuse(model, (torch.randn(4, 6),), measure=False).save(tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as new, zipfile.ZipFile(tmp_path / "old.pt2", "w") as old:
        for entry in new.infolist():
            if not entry.filename.endswith("signature.json"):
                old.writestr(entry, new.read(entry))
    x = torch.randn(3, 6)
    close(fe.load(tmp_path / "old.pt2")(x), model(x))
    with pytest.raises(ValueError, match="x is not among them"):
        fe.load(tmp_path / "old.pt2")(x=x)


@pytest.mark.parametrize("content", ["[]", "{}", '{"positional": 3, "defaults": {}}', "x"])
def test_damaged_signature(content, tmp_path):
    fe.fuse(Masked().eval(), (torch.randn(4, 6),), measure=False).save(tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as new, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for entry in new.infolist():
            bad.writestr(entry, content if entry.filename.endswith("signature.json") else new.read(entry))
    with pytest.raises(ValueError, match="is not a fused model"):
        fe.load(tmp_path / "bad.pt2")


def test_stored_signature_is_plain(tmp_path):
    fe.fuse(Masked().eval(), selected(("x", "mask"), 4), measure=False).save(tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("signature.json")]
        assert json.loads(archive.read(name)) == {
            "positional": ["x", "mask"],
            "defaults": {"mask": None, "table": None, "options": None, "scale": 1.0},
        }


def test_latency_and_pruning(counted_costs):
    model, example = Masked().eval(), selected(("mask", "x"), 4)
    assert measure_latency(model, example, ["relu"]).sites == {"relu"}
    result = fe.prune(
        model,
        train=lambda m: None,
        evaluate=lambda m: 1.0,
        calibrate=lambda m: m(**example),
        example_inputs=example,
        criterion="entropy-per-latency",
    )
    assert result.removed == ("relu",)
    fused = fe.fuse(result.model, example)
    close(fused(**shuffled(selected(("mask", "x"), 4) | example)), result.model(**example))


def test_fused_models_compile_and_export_with_keywords():
    model = Masked().eval()
    fused = fe.fuse(model, selected(("mask", "x"), 4), measure=False)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for batch in (3, 5):
        inputs = selected(("x", "mask"), batch)
        close(compiled(**inputs), model(**inputs))
    inputs = selected(("x", "mask"), 3)
    close(torch.export.export(fused, (), inputs).module()(**inputs), model(**inputs))


@pytest.mark.slow
def test_package_and_onnx(tmp_path):
    model, names = Masked().eval(), ("mask", "x", "scale")
    fused = fe.fuse(model, selected(names, 4), measure=False)
    fused.save_package(tmp_path / "model.so.pt2")
    inputs = selected(names, 3)
    package = torch._inductor.aoti_load_package(str(tmp_path / "model.so.pt2"))
    close(package(**inputs), model(**inputs))
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fused.save_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert {each.name for each in session.get_inputs()} == {"mask", "x"}
    (output,) = session.run(None, {name: inputs[name].numpy() for name in ("x", "mask")})
    close(torch.from_numpy(output), model(**inputs))


def bert():
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=40,
    )
    return transformers.BertModel(config).eval()


def llama():
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=37
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(batch, length=7):
    """Return a padded batch of random token ids as a tokenizer does."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return transformers.BatchEncoding({"attention_mask": mask, "input_ids": torch.randint(0, 99, (batch, length))})


@pytest.mark.slow
@pytest.mark.parametrize(("build", "options"), [(bert, {}), (llama, {"use_cache": False})], ids=["bert", "llama"])
def test_transformers(build, options, tmp_path):
    torch.manual_seed(0)
    model = build()
    fused = fe.fuse(model, {**tokens(3), **options}, measure=False)
    fused.save(tmp_path / "model.pt2")
    loaded = fe.load(tmp_path / "model.pt2")
    for batch in (2, 5):
        given = tokens(batch)
        expected = model(**given, **options)[0]
        for each in (fused, loaded):
            close(each(**given, **options)[0], expected)
            close(each(given["input_ids"], attention_mask=given["attention_mask"], **options)[0], expected)
    with pytest.raises(ValueError, match="attention_mask is missing"):
        loaded(input_ids=given["input_ids"], **options)
    with pytest.raises(ValueError, match="is not among them"):
        loaded(**given, **options, **{"token_type_ids" if build is bert else "labels": given["input_ids"]})
