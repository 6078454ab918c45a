"""Models are loaded with all their saved weights, and run without work that only serves outputs nobody reads."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaModel, MixtralConfig, T5Config, T5ForConditionalGeneration

from fastentropy.calibration.pretrained import Pretrained, load_pretrained
from tests.calibration import cases

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in cases.MODELS:
        cases.save_model(name, folder / name)
    return folder


def load(folder, kind="text", dtype="auto"):
    return load_pretrained(str(folder), kind=kind, dtype=dtype, device=CPU)


@pytest.mark.parametrize("name", cases.MODELS)
def test_weights_are_those_saved(place, name):
    pretrained = load(place / name, "images" if name == "vit" else "text")
    saved = cases.MODELS[name][0]()
    assert type(pretrained.model) is type(saved)
    assert not pretrained.model.training
    weights = pretrained.model.state_dict()
    assert weights.keys() == saved.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in saved.state_dict().items())


@pytest.mark.parametrize(("name", "options"), [("llama", ["logits_to_keep", "use_cache"]), ("vit", []), ("bert", [])])
def test_forward_options_the_model_takes(place, name, options):
    pretrained = load(place / name, "images" if name == "vit" else "text")
    assert set(options) <= pretrained.options.keys()
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 8)} if name == "vit" else {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    output = pretrained.forward(inputs)
    assert getattr(output, "past_key_values", None) is None
    if name == "llama":
        assert output.logits.shape == (1, 1, len(cases.IDS))


def test_bare_model_and_unknown_architecture(place, tmp_path):
    for name, architectures in (("bare", ["BertModel"]), ("unknown", ["pipeline"]), ("none", None)):
        torch.manual_seed(3)
        model = BertModel(BertConfig(vocab_size=len(cases.IDS), hidden_size=16, intermediate_size=24, num_attention_heads=2,
                                     num_hidden_layers=1))  # fmt: skip
        model.save_pretrained(tmp_path / name)
        cases.tokenizer().save_pretrained(tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
        assert type(load(tmp_path / name).model) is BertModel
    edited = shutil.copytree(place / "llama", tmp_path / "llama")
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    assert type(load(edited).model) is LlamaModel


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float64), ("bfloat16", torch.bfloat16)])
def test_dtype(place, dtype, expected):
    assert load(place / "llama", dtype=dtype).dtype == expected


@pytest.mark.parametrize(("changed", "length"), [({}, 16), ({"model_max_length": 40}, 40), ({"model_max_length": 10**30}, 64)])
def test_max_length_is_the_lowest_limit(place, tmp_path, changed, length):
    folder = shutil.copytree(place / "llama", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    assert load(folder).max_length == length


def test_fingerprint_of_names_dtypes_and_values(place):
    first = load(place / "llama")
    assert first.fingerprint() == load(place / "llama").fingerprint()
    others = [load(place / "llama", dtype="float32"), load(place / "gpt2"), load(place / "llama")]
    with torch.no_grad():
        others[2].model.model.norm.weight[3] += 1e-6
    assert len({pretrained.fingerprint() for pretrained in [first, *others]}) == 4


def swap_words(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda config: config.update(rms_norm_eps=1e-5)),
        ("config.json", lambda config: config.update(hidden_act="gelu")),
        ("tokenizer.json", swap_words),
    ],
)
def test_fingerprint_of_configuration_and_tokenizer(place, tmp_path, file, change):
    folder = shutil.copytree(place / "llama", tmp_path / "model")
    assert load(folder).fingerprint() == load(place / "llama").fingerprint()  # the folder's name does not matter
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    assert load(folder).fingerprint() != load(place / "llama").fingerprint()


def test_fingerprint_of_buffers_and_last_values(place):
    first, behind = load(place / "llama"), load(place / "llama")
    with torch.no_grad():
        behind.model.model.embed_tokens.weight[-1] -= 1.0
    assert first.fingerprint() != behind.fingerprint()
    with torch.no_grad():
        first.model.register_buffer("kept", torch.zeros(3))
        before = first.fingerprint()
        first.model.kept[1] = 1.0
    assert first.fingerprint() != before


def test_has_experts(place):
    dense = load(place / "llama")
    assert not dense.has_experts
    config = MixtralConfig(num_local_experts=4)
    model = nn.Module()
    model.config = config
    assert dataclasses.replace(dense, model=model).has_experts


def test_padding_on_the_right(place, tmp_path):
    folder = shutil.copytree(place / "llama", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    assert load(folder).processor.padding_side == "right"


def test_takes_argument_of_a_submodule():
    pretrained = Pretrained("llama", cases.llama(), "text", None, {})
    assert pretrained.takes_argument("attention_mask")
    assert pretrained.takes_argument("position_embeddings")
    assert not pretrained.takes_argument("padding")


def test_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=len(cases.IDS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=1)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    cases.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an encoder and a decoder"):
        load(tmp_path)
