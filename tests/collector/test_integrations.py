"""Libraries that look at models, wrap their forwards or change them: each behaves while collecting as it does without."""

import contextlib
import copy
import tempfile

import pytest
import torch
import transformers
from torch import nn

from fastentropy import collect
from tests._helpers.architectures import ARCHITECTURES, GROUPED, SEQ2SEQ, TEXT
from tests._helpers.counts import plain_counts
from tests._helpers.invisibility import appearance, assert_invisible, differences
from tests._helpers.oracle import observed_calls, one_thread
from tests._helpers.statistics import counted

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SHARP: dict[str, object] = {"initializer_range": 0.5, "init_std": 0.5}  # so that other inputs give other tokens


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with one_thread():
        yield


def counts_of(model, run):
    """The counts of all calls of each activation while a function runs, by an oracle that knows nothing of fastentropy."""
    counts = {}

    def add(name, named, x, channels):
        name = name.partition(":")[0]
        counts[name] = counts.get(name, 0) + plain_counts(x, x.ndim - 1)

    with observed_calls(model, add):
        run()
    return counts


def assert_counts(collector, expected):
    sites = collector.compute()
    assert list(sites) == list(expected)
    assert [name for name, site in sites.items() if not torch.equal(site.counts, expected[name])] == []


# Generation --------------------------------------------------------------------------------------------------------------

BART: dict[str, object] = {
    "vocab_size": 50,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    **SHARP,
}
GENERATORS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED | SHARP)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**TEXT | SHARP, n_inner=40)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SEQ2SEQ, initializer_factor=4.0, decoder_start_token_id=0, pad_token_id=0)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
}
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True},
    "sampling": {"do_sample": True, "top_k": 10},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def ids_with_padding(model):
    """Ids of which the first sequence is padded, on the left where a decoder goes on from them."""
    ids = torch.randint(3, 50, (3, 7))
    ids[0, slice(4, 7) if model.config.is_encoder_decoder else slice(0, 3)] = 0
    return ids


GENERATIONS = [("llama", way, given) for way in WAYS for given in ("whole", "padded", "padded with a mask")]
GENERATIONS += [(kind, way, "padded") for kind in ("gpt2", "t5", "bart") for way in ("greedy", "beams")]


@pytest.mark.parametrize(("kind", "way", "given"), GENERATIONS)
def test_generation_gives_equal_tokens(kind, way, given):
    torch.manual_seed(0)
    model = GENERATORS[kind]().eval()
    ids = torch.randint(3, 50, (3, 7)) if given == "whole" else ids_with_padding(model)
    inputs = {"input_ids": ids} | ({"attention_mask": (ids != 0).long()} if given == "padded with a mask" else {})

    def run():
        return model.generate(**inputs, max_new_tokens=6, **WAYS[way])

    run()  # the first sets attributes of the model
    collector = assert_invisible(model, run, inside=[])
    if given == "whole":
        torch.manual_seed(7)
        assert_counts(collector, {name: 2 * counts for name, counts in counts_of(model, run).items()})


# Trainer -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_trainer_trains_and_evaluates_alike(options):
    config = transformers.BertConfig(**TEXT | {"num_hidden_layers": 1})
    data = [
        {"input_ids": ids, "attention_mask": torch.tensor([1] * 5 + [0, 0]), "labels": ids[0] % 2, "text": torch.zeros(1)}
        for ids in torch.randint(3, 50, (8, 7), generator=torch.Generator().manual_seed(1))
    ]

    def train(is_collecting):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        arguments = transformers.TrainingArguments(
            tempfile.mkdtemp(), use_cpu=True, report_to="none", max_steps=3, logging_steps=1, save_strategy="no",
            per_device_train_batch_size=4, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        columns = []
        hook = model.register_forward_pre_hook(lambda m, args, kwargs: columns.append(sorted(kwargs)), with_kwargs=True)
        collector = collect(model)
        with collector if is_collecting else contextlib.nullcontext():
            trainer.train()
            metrics = [trainer.evaluate(), *trainer.state.log_history]
            predictions = trainer.predict(data).predictions
        hook.remove()
        metrics = [{key: value for key, value in each.items() if "second" not in key and "time" not in key} for each in metrics]
        return [model.state_dict(), metrics, torch.from_numpy(predictions), columns], collector

    expected, _ = train(False)
    actual, collector = train(True)
    assert differences(expected, actual) == []
    assert expected[3][0] == ["attention_mask", "input_ids", "labels", "num_items_in_batch"]
    assert counted(collector) == {"bert.encoder.layer.0.intermediate.intermediate_act_fn": (3 * 4 + 2 * 8) * 5 * 40}


# PEFT --------------------------------------------------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).eval()


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_dropout=0.1)
    return peft.get_peft_model(model, config)


ACTIVATIONS = [f"model.layers.{layer}.mlp.act_fn" for layer in range(2)]


@pytest.mark.parametrize("collected", ["adapted model", "model inside"])
def test_lora_computes_and_learns_alike(collected):
    model, ids = with_lora(llama()), torch.randint(3, 50, (3, 7))

    def run():
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        with model.disable_adapter(), torch.no_grad():
            plain = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        return output.logits, plain, merged, [weight.grad for weight in model.parameters() if weight.requires_grad]

    # Merging and unmerging rounds, so that the weights differ from run to run.
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def run_afresh():
        model.load_state_dict(state)
        return run()

    inner = model if collected == "adapted model" else model.get_base_model()
    collector = assert_invisible(model, run_afresh, collect(inner))
    prefix = "base_model.model." if collected == "adapted model" else ""
    assert counted(collector) == {prefix + name: 2 * 3 * 21 * 40 for name in ACTIVATIONS}


def test_lora_that_is_put_in_meanwhile():
    model, ids = llama(), torch.randint(3, 50, (3, 7))
    other = copy.deepcopy(model)
    with collect(model) as collector:
        before = model(input_ids=ids).logits
        torch.manual_seed(1)
        after = with_lora(model).eval()(input_ids=ids).logits
    torch.manual_seed(1)
    assert torch.equal(before, other(input_ids=ids).logits)
    assert torch.equal(after, with_lora(other).eval()(input_ids=ids).logits)
    assert counted(collector) == dict.fromkeys(ACTIVATIONS, 2 * 21 * 40)


# accelerate --------------------------------------------------------------------------------------------------------------


def offloaded(way, model):
    """A model whose weights come to the device for the time of each forward."""
    import accelerate

    if way == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if way == "disk_offload":
        return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=torch.device("cpu"))
    if way == "dispatch_model":
        devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
                   "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
        return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)
    for name, module in model.named_modules():
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        accelerate.hooks.add_hook_to_module(module, hook, append=name.endswith("act_fn"))
    return model


OFFLOADING = ["cpu_offload", "disk_offload", "dispatch_model", "hooks"]


@pytest.mark.parametrize("way", OFFLOADING)
def test_offloaded_model(way):
    model, ids = offloaded(way, llama()), torch.randint(3, 50, (3, 7))
    with torch.no_grad():
        collector = assert_invisible(model, lambda: model(input_ids=ids).logits)
        assert_counts(collector, {name: 2 * counts for name, counts in counts_of(model, lambda: model(input_ids=ids)).items()})


@pytest.mark.parametrize("passes_before", [0, 1])
@pytest.mark.parametrize("way", OFFLOADING)
def test_offloaded_meanwhile_and_no_longer(way, passes_before):
    from accelerate.hooks import remove_hook_from_submodules

    model, ids = llama(), torch.randint(3, 50, (3, 7))
    with torch.no_grad():
        expected, before = model(input_ids=ids).logits, appearance(model)
        with collect(model) as collector:
            for _ in range(passes_before):
                model(input_ids=ids)
            offloaded(way, model)
            assert torch.equal(model(input_ids=ids).logits, expected)
            remove_hook_from_submodules(model)
            assert torch.equal(model(input_ids=ids).logits, expected) or way != "hooks"
        assert appearance(model).keys() == before.keys()
    assert counted(collector) == dict.fromkeys(ACTIVATIONS, (passes_before + 2) * 21 * 40)


# Lightning ---------------------------------------------------------------------------------------------------------------


def test_lightning_fits_and_validates_alike():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers, self.seen = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 1)), []

        def forward(self, x):
            return self.layers(x)

        def training_step(self, batch, index):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, index):
            self.seen.append(self.forward(batch[0]))
            self.log("loss", self.seen[-1].mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(3)))

    def fit(is_collecting):
        torch.manual_seed(0)
        model = Module()
        loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tempfile.mkdtemp(),
        )  # fmt: skip
        collector = collect(model)
        with collector if is_collecting else contextlib.nullcontext():
            trainer.fit(model, loader)
            metrics = trainer.validate(model, torch.utils.data.DataLoader(data, batch_size=4), verbose=False)
        return [model.state_dict(), metrics, model.seen], collector

    expected, _ = fit(False)
    actual, collector = fit(True)
    assert differences(expected, actual) == []
    assert counted(collector) == {"layers.1": 3 * 12 * 6}


# Masks -------------------------------------------------------------------------------------------------------------------

MASKED = "albert bert distilbert falcon gemma2 gpt2 llama mixtral opt phi3 qwen2 roberta t5".split()  # noqa: SIM905


@pytest.mark.parametrize("kind", MASKED)
def test_padded_batches(kind):
    architecture = ARCHITECTURES[f"hf_{kind}"]
    torch.manual_seed(0)
    model, inputs = architecture.build().eval(), architecture.inputs(3)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    mask[2, 6:] = 0
    inputs["attention_mask"] = mask

    def run():
        return list(model(**inputs).values())

    counts = {}

    def add(name, named, x, channels):
        x = x.flatten(0, -2)
        is_masked = len(x) == mask.numel() and not (kind == "t5" and name.startswith("decoder"))
        counts[name] = 2 * plain_counts(x[mask.flatten() > 0] if is_masked else x, 1)

    with torch.inference_mode():
        collector = assert_invisible(model, run)
        with observed_calls(model, add):
            run()
    assert_counts(collector, counts)
