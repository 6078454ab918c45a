"""Padding in the collector, against models that count their tokens themselves."""

import pytest
import torch
import transformers
from torch import nn

import fastentropy as fe
from fastentropy.sites.padding import mask_argument, positions_to_count, token_mask

TINY = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def tokens(batch=3, length=7):
    return torch.randint(3, 97, (batch, length))


def collected(model, *calls, mask="attention_mask"):
    """The statistics of several calls, each given by its keyword arguments."""
    with torch.inference_mode(), fe.collect(model.eval(), mask=mask) as collector:
        for kwargs in calls:
            model(**kwargs)
    return collector.compute()


def assert_counts_of_the_rows_alone(model, ids, mask):
    """Without padding each row runs by itself, so that its counts are right without a mask."""
    rows = [{"input_ids": row[kept.bool()][None]} for row, kept in zip(ids, mask, strict=True)]
    expected = collected(model, *rows, mask=None)
    actual = collected(model, {"input_ids": ids, "attention_mask": mask})
    assert list(actual) == list(expected)
    for name, site in actual.items():
        assert torch.equal(site.counts, expected[name].counts), name
        assert site.nan == 0


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))


def bert():
    return transformers.BertModel(transformers.BertConfig(**TINY))


def opt():
    config = {"vocab_size": 97, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config, word_embed_proj_dim=16, max_position_embeddings=32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("model", [llama, bert, opt])
def test_right_padding_is_not_counted(model, dtype):
    assert_counts_of_the_rows_alone(model(), tokens(), RIGHT.to(dtype))


def test_left_padding_is_not_counted():
    model, ids = llama(), tokens()
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    actual = collected(model, {"input_ids": ids, "attention_mask": LEFT, "position_ids": positions})
    assert all(site.observations == int(LEFT.sum()) * 24 for site in actual.values())


def test_the_mask_may_be_given_by_position():
    model, ids = bert().eval(), tokens()
    with torch.inference_mode(), fe.collect(model) as collector:
        model(ids, RIGHT)
    assert all(site.observations == int(RIGHT.sum()) * 24 for site in collector.compute().values())


def test_a_mask_of_ones_changes_nothing():
    model, ids = bert(), tokens()
    with_mask = collected(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    without = collected(model, {"input_ids": ids})
    assert all(torch.equal(with_mask[name].counts, without[name].counts) for name in without)


def test_generation_with_a_cache_counts_each_token_once():
    model, new = llama().eval(), 5
    with torch.inference_mode(), fe.collect(model) as collector:
        model.generate(
            input_ids=tokens(), attention_mask=LEFT, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
    expected = (int(LEFT.sum()) + 3 * (new - 1)) * 24
    assert [site.observations for site in collector.compute().values()] == [expected] * 2


def test_encoder_and_decoder_have_masks_of_their_own():
    config = transformers.T5Config(
        vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model, ids = transformers.T5ForConditionalGeneration(config), tokens()
    for decoder_mask, count in ((None, 21), (LEFT, int(LEFT.sum()))):
        call = {"input_ids": ids, "attention_mask": RIGHT, "decoder_input_ids": ids, "decoder_attention_mask": decoder_mask}
        encoder, decoder = (site.observations for site in collected(model, call).values())
        assert (encoder, decoder) == (int(RIGHT.sum()) * 24, count * 24)


def test_an_activation_of_pooled_sequences_ignores_the_mask():
    config = transformers.DistilBertConfig(vocab_size=97, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    if not any("activation" in name or "relu" in name for name, _ in model.named_modules()):
        pytest.fail("the model has no activation any more")
    with torch.inference_mode(), pytest.warns(UserWarning, match="isolate"), fe.collect(model) as collector:
        model(input_ids=tokens(), attention_mask=RIGHT)
    *layers, head = collector.compute().values()
    assert [site.observations for site in layers] == [int(RIGHT.sum()) * 24]
    assert head.observations == 3 * 16


def test_the_mask_can_be_a_function_or_another_name_or_off():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(4, 5), nn.GELU()

        def forward(self, x, lengths=None, keep=None):
            return self.act(self.fc(x))

    def mask(args, kwargs):
        return torch.arange(7)[None] < kwargs["lengths"][:, None]

    x, lengths = torch.randn(2, 7, 4), torch.tensor([3, 7])
    model = Model()
    assert collected(model, {"x": x, "lengths": lengths}, mask=mask)["act"].observations == 10 * 5
    assert collected(model, {"x": x, "keep": mask((), {"lengths": lengths})}, mask="keep")["act"].observations == 10 * 5
    assert collected(model, {"x": x, "keep": mask((), {"lengths": lengths})}, mask=None)["act"].observations == 14 * 5


def test_nan_in_padding_is_not_counted_either():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x, attention_mask):
            return self.act(x)

    x = torch.ones(2, 3, 4)
    x[0, 2], x[1, 0, 0] = float("nan"), float("nan")
    site = collected(Model(), {"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})["act"]
    assert (site.observations, site.nan) == (19, 1)


def test_a_mask_of_another_form_is_told_once():
    model, ids = llama().eval(), tokens()
    mask = torch.ones(3, 1, 7, 7).tril().bool()
    with torch.inference_mode(), fe.collect(model) as collector:
        with pytest.warns(UserWarning, match=r"attention_mask of shape \[3, 1, 7, 7\] does not tell which tokens are padding"):
            model(ids, attention_mask=mask)
        model(ids, attention_mask=mask)
    assert [site.observations for site in collector.compute().values()] == [2 * 21 * 24] * 2


def test_a_forward_that_takes_any_keyword_takes_the_mask():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x, **kwargs):
            return self.act(x)

    site = collected(Model(), {"x": torch.ones(3, 7, 4), "attention_mask": RIGHT})["act"]
    assert site.observations == int(RIGHT.sum()) * 4


@pytest.mark.parametrize("shape", [(3, 1, 7, 7), (7,), ()])
def test_masks_with_another_number_of_axes_are_no_padding(shape):
    assert token_mask(torch.zeros(shape), (), {}) is None


def test_a_mask_that_is_added_to_scores_is_no_padding():
    assert token_mask(torch.full((3, 7), -1e9), (), {}) is None


def test_a_mask_that_covers_a_cache_is_cut_to_this_call():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    assert token_mask(mask, (), {"input_ids": torch.zeros(2, 2, dtype=torch.int64)}).tolist() == [[True, False], [False, True]]
    assert token_mask(mask[:, :1], (torch.zeros(2, 3, 8),), {}) is None


@pytest.mark.parametrize(
    ("shape", "axis", "applies"),
    [
        ((3, 7, 5), 2, True),
        ((21, 5), 1, True),
        ((3, 7, 5), 1, False),
        ((3, 5), 1, False),
        ((3, 7, 2, 5), 3, False),
        ((7, 3, 5), 2, False),
    ],
)
def test_the_mask_holds_for_tensors_made_of_the_tokens(shape, axis, applies):
    positions = positions_to_count(RIGHT.bool(), torch.zeros(shape), axis)
    assert (positions is not None) == applies
    assert positions is None or torch.equal(positions.flatten(), RIGHT.bool().flatten())


def test_the_mask_is_found_in_the_signature():
    class Model(nn.Module):
        def forward(self, x, attention_mask=None, *, other=None):
            return x

    assert mask_argument(Model(), "attention_mask").given((1, 2), {}) == (True, 2)
    assert mask_argument(Model(), "attention_mask").given((1,), {}) == (False, None)
    assert mask_argument(Model(), "other").given((1, 2), {"other": 3}) == (True, 3)
    assert mask_argument(Model(), "mask") is None
