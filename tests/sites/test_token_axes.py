"""Where token positions lie, in models of which every activation's positions are written down by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.padding import BY_SHAPE, TokenAxes, find_tokens, positions_to_count, token_mask

IDS = torch.randint(1, 9, (3, 5))


class Parts(nn.Module):
    """Layers that the cases below combine."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fc, self.latents = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(5, 4))
        self.norm, self.conv, self.over_tokens = nn.LayerNorm(4), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(5, 5)
        self.patches = nn.Conv2d(3, 4, 2, 2)

    def embed(self):
        return self.norm(self.fc(self.embedding(IDS)))

    def pool(self):
        h = self.embed()
        return (self.latents @ h.mT).softmax(-1) @ h


def heads(h):
    return h.view(*h.shape[:2], 2, 2).transpose(1, 2)


CASES = {
    "embeddings": (lambda m: m.embed(), TokenAxes(0, 1)),
    "positions added": (lambda m: m.embed() + torch.rand(5, 4), TokenAxes(0, 1)),
    "tokens first": (lambda m: m.embed().transpose(0, 1), TokenAxes(1, 0)),
    "merged": (lambda m: m.embed().reshape(-1, 4), TokenAxes(0, 0)),
    "merged and back": (lambda m: m.fc(m.embed().view(-1, 4)).view(3, 5, 4), TokenAxes(0, 1)),
    "merged, tokens first": (lambda m: m.embed().transpose(0, 1).reshape(15, 4), None),
    "channels first": (lambda m: m.embed().mT, TokenAxes(0, 2)),
    "heads": (lambda m: heads(m.embed()), TokenAxes(0, 2)),
    "attention": (lambda m: F.scaled_dot_product_attention(*[heads(m.embed())] * 3), TokenAxes(0, 2)),
    "attention by hand": (lambda m: (h := heads(m.embed())).mul(1) @ (h.mT @ h).softmax(-1), TokenAxes(0, 2)),
    "attention, merged": (
        lambda m: (q := heads(m.embed()).reshape(6, 5, 2)).bmm(q.mT).bmm(q).view(3, 2, 5, 2).transpose(1, 2).reshape(3, 5, 4),
        TokenAxes(0, 1),
    ),
    "scores": (lambda m: heads(m.embed()) @ heads(m.embed()).mT, TokenAxes(0, 2)),
    "convolved": (lambda m: m.conv(m.embed().mT), TokenAxes(0, 2)),
    "gated by the mean": (lambda m: m.embed() * m.embed().mean(1, keepdim=True), TokenAxes(0, 1)),
    "scalar head": (lambda m: nn.Linear(4, 1)(m.embed()).squeeze(-1), TokenAxes(0, 1)),
    "rotary": (lambda m: torch.cat([-m.embed()[..., 2:], m.embed()[..., :2]], -1), TokenAxes(0, 1)),
    "mean": (lambda m: m.embed().mean(1), None),
    "first token": (lambda m: m.embed()[:, 0], None),
    "maximum": (lambda m: m.embed().amax(1, keepdim=True).expand(3, 5, 4), None),
    "last tokens": (lambda m: m.embed()[torch.arange(3), torch.tensor([1, 4, 2])], None),
    "latents as long as the tokens": (lambda m: m.pool(), None),
    "latents, by attention": (
        lambda m: F.scaled_dot_product_attention(m.latents.expand(3, 5, 4), m.embed(), m.embed()),
        None,
    ),
    "latents, by a layer over tokens": (lambda m: m.over_tokens(m.embed().mT).mT, None),
    "residual of a layer over tokens": (lambda m: m.embed() + m.over_tokens(m.embed().mT).mT, TokenAxes(0, 1)),
    "tokens that attend to latents": (lambda m: F.scaled_dot_product_attention(m.embed(), m.pool(), m.pool()), TokenAxes(0, 1)),
    "patches": (lambda m: m.patches(torch.rand(3, 3, 2, 10)).flatten(2).mT, None),
    "another input": (lambda m: m.fc(torch.rand(3, 5, 4)), None),
    "shifted": (lambda m: m.embed().roll(1, 1), BY_SHAPE),
    "reversed": (lambda m: m.embed().flip(1), BY_SHAPE),
    "sorted": (lambda m: m.embed()[:, torch.randperm(5)], BY_SHAPE),
    "a graph of tokens": (lambda m: torch.rand(3, 5, 5) @ m.embed(), BY_SHAPE),
    "longer and back": (lambda m: torch.cat([torch.zeros(3, 1, 4), m.embed()], 1)[:, 1:], BY_SHAPE),
    "an operator nobody knows": (lambda m: torch.linalg.matrix_exp(torch.rand(3, 4, 4) @ m.embed().mT[:, :, :4]), BY_SHAPE),
    "nested": (
        lambda m: torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(m.embed()).clone(), 0.0),
        BY_SHAPE,
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("case", CASES)
def test_where_tokens_lie(case, mode):
    function, expected = CASES[case]
    if case == "nested" and mode is torch.inference_mode:
        pytest.skip("nested tensors are not built in inference mode")
    model = Parts()
    tracker = AxisTracker(model.parameters())
    with mode(), tracker.following():
        tracker.follow_tokens(IDS)
        y = function(model)
    assert tracker.token_axes(y) == expected


ELEMENTWISE = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardtanh", "hardswish"),
    *("hardsigmoid", "sigmoid", "abs", "neg", "exp"),
)


@pytest.mark.parametrize("name", [*ELEMENTWISE, "eq", "gt", "le", "copysign", "add", "mul"])
def test_elementwise_operators_keep_tokens(name):
    for variant in (name, f"{name}_"):
        operator = getattr(torch.ops.aten, variant, None)
        if operator is None:
            continue
        model, others = Parts(), () if name in ELEMENTWISE else (torch.rand(3, 5, 4),)
        tracker = AxisTracker(model.parameters())
        with torch.no_grad(), tracker.following():
            tracker.follow_tokens(IDS)
            y = operator(model.embed(), *others)
        assert (tracker.axis_of(y), tracker.token_axes(y)) == (2, TokenAxes(0, 1)), variant


@pytest.mark.parametrize("sizes", [(1, 5), (3, 1), (1, 1)])
def test_single_sequences_and_tokens(sizes):
    model, ids = Parts(), torch.ones(sizes, dtype=torch.long)
    tracker = AxisTracker(model.parameters())
    mask = torch.rand(sizes) > 0.5
    with torch.no_grad(), tracker.following():
        tracker.follow_tokens(ids)
        y = model.fc(model.embedding(ids))
        forms = [y, y.transpose(0, 1), y.view(-1, 4), y.mT, y.view(*sizes, 2, 2).transpose(1, 2)]
    for form in forms:
        axis = form.ndim - 1 if form.shape[-1] in (2, 4) else form.ndim - 2
        positions = positions_to_count(mask, form, axis, tracker.token_axes(form))
        assert positions is not None
        assert positions.sum() * form.shape[axis] == mask.sum() * 4


def test_each_set_of_tokens_has_positions_of_its_own():
    model, others = Parts(), IDS.clone()
    tracker = AxisTracker(model.parameters())
    with torch.no_grad(), tracker.following():
        tracker.follow_tokens(IDS)
        first = model.embedding(IDS)
        tracker.follow_tokens(others)
        second = model.embedding(others)
        assert (tracker.token_axes(first), tracker.token_axes(second)) == (None, TokenAxes(0, 1))
        attended = F.scaled_dot_product_attention(second, first, first)
        assert tracker.token_axes(attended) == TokenAxes(0, 1)
        tracker.follow_tokens(IDS)
        assert (tracker.token_axes(first), tracker.token_axes(attended)) == (TokenAxes(0, 1), None)
        tracker.follow_tokens(model.fc(first))  # a module that is called with embeddings of the same tokens
        assert tracker.token_axes(first) == TokenAxes(0, 1)


def test_without_tokens_the_shape_decides():
    tracker = AxisTracker()
    assert tracker.token_axes(torch.rand(3, 5, 4)) == BY_SHAPE


@pytest.mark.parametrize(
    ("shape", "channel_axis", "token_axes", "order"),
    [
        ((3, 5, 4), 2, TokenAxes(0, 1), "bt"),
        ((5, 3, 4), 2, TokenAxes(1, 0), "tb"),
        ((15, 4), 1, TokenAxes(0, 0), "(bt)"),
        ((3, 4, 5), 1, TokenAxes(0, 2), "bt"),
        ((3, 2, 5, 4), 3, TokenAxes(0, 2), "bht"),
        ((3, 5), None, TokenAxes(0, 1), "bt"),
        ((5, 3), None, TokenAxes(1, 0), "tb"),
    ],
)
def test_positions_are_those_of_the_tokens(shape, channel_axis, token_axes, order):
    mask = torch.rand(3, 5) > 0.4
    expected = {"bt": mask, "tb": mask.T, "(bt)": mask.flatten(), "bht": mask[:, None].expand(3, 2, 5)}[order]
    assert torch.equal(positions_to_count(mask, torch.empty(shape), channel_axis, token_axes), expected)


@pytest.mark.parametrize(
    ("shape", "channel_axis", "token_axes"),
    [((3, 5, 4), 2, None), ((3, 6, 4), 2, TokenAxes(0, 1)), ((3, 5, 4), 1, TokenAxes(0, 1)), ((3, 4), 1, TokenAxes(0, 0))],
)
def test_no_positions_where_the_mask_does_not_fit(shape, channel_axis, token_axes):
    assert positions_to_count(torch.rand(3, 5) > 0.4, torch.empty(shape), channel_axis, token_axes) is None


@pytest.mark.parametrize("size", [3, 5, 8])
@pytest.mark.parametrize(
    "pattern",
    [torch.tril, torch.triu, lambda x: x.tril().triu(-1), lambda x: 1 - x.tril(), lambda x: 1 - x.triu(1)],
    ids=["causal", "anticausal", "window", "inverted", "inverted, with itself"],
)
def test_a_pattern_of_attention_is_no_padding_mask(size, pattern):
    mask = pattern(torch.ones(size, size, dtype=torch.long))
    assert token_mask(mask, (torch.rand(size, size, 4),), {}) is None or bool(
        token_mask(mask, (torch.rand(size, size, 4),), {}).all()
    )


def test_a_square_padding_mask_is_one():
    lengths = torch.tensor([2, 4, 1, 4])
    mask = torch.arange(4)[None] < lengths[:, None]
    assert torch.equal(token_mask(mask, (torch.rand(4, 4, 3),), {}), mask)


IDS_5, IDS_3 = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
EMBEDDED, FRAMES = torch.rand(2, 5, 4), torch.rand(2, 4, 9)


@pytest.mark.parametrize(
    ("length", "args", "kwargs", "expected"),
    [
        (5, (IDS_5,), {}, IDS_5),
        (5, (EMBEDDED, IDS_5), {}, IDS_5),
        (5, (EMBEDDED, IDS_3), {}, EMBEDDED),
        (5, (IDS_3, IDS_5), {}, IDS_5),
        (9, (IDS_3,), {}, IDS_3),
        (9, (FRAMES,), {}, FRAMES.mT),
        (9, (), {"position_ids": IDS_3.clone(), "input_ids": IDS_3}, IDS_3),
        (5, ({"ids": [IDS_5]},), {}, IDS_5),
        (5, (EMBEDDED.transpose(0, 1).contiguous(),), {}, EMBEDDED),
        (4, (IDS_5,), {}, None),
        (5, (), {}, None),
    ],
)
def test_the_tokens_of_a_call(length, args, kwargs, expected):
    mask = torch.ones(2, length)
    mask[0, -1] = 0
    found = find_tokens(mask, (*args, mask), kwargs)
    assert (found is None) == (expected is None)
    assert found is None or (torch.equal(found, expected) and (not found.is_contiguous() or found is expected or length == 5))
    expected_mask = (
        None if expected is None and args else mask[:, -(length if expected is None else expected.shape[1]) :].bool()
    )
    is_token = token_mask(mask, (*args, mask), kwargs)
    assert (is_token is None) == (expected_mask is None)
    assert is_token is None or torch.equal(is_token, expected_mask)
