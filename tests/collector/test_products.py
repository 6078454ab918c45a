"""Gated MLPs: their products are computed by the kernel that counts, and nobody can tell."""

import weakref

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import fastentropy as fe
from fastentropy.collector import products
from tests._helpers.counts import plain_counts
from tests._helpers.invisibility import assert_invisible

pytestmark = pytest.mark.filterwarnings("ignore:.*fe.isolate")
PASSES = 5


class Gated(nn.Module):
    """A gated MLP."""

    def __init__(self, act, up=7):
        super().__init__()
        self.gate_proj, self.up_proj, self.act_fn, self.down_proj = nn.Linear(3, 7), nn.Linear(3, up), act, nn.Linear(7, 3)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Forgiving(Gated):
    """Goes on if its product fails."""

    def forward(self, x):
        try:
            return self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        except RuntimeError:
            return x


class Twice(Gated):
    """Uses what the activation returns a second time."""

    def forward(self, x):
        y = self.act_fn(self.gate_proj(x))
        return y * self.up_proj(x) + y


@pytest.fixture
def kernels(monkeypatch):
    """How the deferred activations ended: True for the kernel, False for the activation alone."""
    ended = []
    multiply, run = products.DeferredActivation.__mul__, products.DeferredActivation.run

    def multiplied(self, gate):
        before = len(ended)
        y = multiply(self, gate)
        if len(ended) == before:
            ended.append(True)
        return y

    def alone(self):
        ended.append(False)
        return run(self)

    monkeypatch.setattr(products.DeferredActivation, "__mul__", multiplied)
    monkeypatch.setattr(products.DeferredActivation, "run", alone)
    return ended


def check(model, x, site="act_fn", passes=PASSES, gate=None, **options):
    """Collect some passes: outputs with the bits of those without a collector, and counts of the plain input."""
    with torch.no_grad():
        inputs = (gate or model.gate_proj)(x)
    expected = model(x)
    with fe.collect(model, **options) as collector:
        for _ in range(passes):
            y = model(x)
            assert type(y) is torch.Tensor
            assert torch.equal(y, expected)
    statistics = collector.compute()[site]
    assert torch.equal(statistics.counts, passes * plain_counts(inputs, inputs.ndim - 1))
    assert statistics.nan == 0


@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.ReLU, nn.Mish, nn.Hardswish, lambda: nn.LeakyReLU(0.3)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3)])
def test_kernel_computes_the_product(act, mode, shape, kernels):
    with mode():
        check(Gated(act()), torch.randn(shape))
    assert len(kernels) >= PASSES - 2  # the first pass discovers the site, the second may be the first with such an input
    assert all(kernels)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(LlamaMLP, LlamaConfig), (MistralMLP, MistralConfig), (Qwen2MLP, Qwen2Config), (GemmaMLP, GemmaConfig)],
)
def test_language_models(kind, config, kernels):
    mlp, x = kind(config(hidden_size=8, intermediate_size=12, num_attention_heads=2)), torch.randn(2, 5, 8)
    with torch.no_grad():
        check(mlp, x)
        assert kernels == ([] if kind is GemmaMLP else [True] * (PASSES - 2))  # whose class of GELU has no kernel
        assert_invisible(mlp, lambda: [mlp(x) for _ in range(4)])
    assert all(kernels)


def test_invisible(kernels):
    model, x = nn.Sequential(Gated(nn.SiLU()), Gated(nn.ReLU())), torch.randn(2, 5, 3)
    with torch.no_grad():
        assert_invisible(model, lambda: [model(x) for _ in range(4)])
    assert kernels
    assert all(kernels)


def test_shapes_that_vary(kernels):
    model = Gated(nn.SiLU())
    collector, expected = fe.collect(model), torch.zeros(7, 3, dtype=torch.int64)
    with torch.no_grad(), collector:
        for size in (1, 4, 4, 4, 9, 9, 9, 4, 4, 1, 2):
            x = torch.randn(size, 3)
            expected += plain_counts(model.gate_proj(x), 1)
            hidden = nn.functional.silu(nn.functional.linear(x, model.gate_proj.weight, model.gate_proj.bias))
            up = nn.functional.linear(x, model.up_proj.weight, model.up_proj.bias)
            assert torch.equal(model(x), nn.functional.linear(hidden * up, model.down_proj.weight, model.down_proj.bias))
    assert torch.equal(collector.compute()["act_fn"].counts, expected)
    assert any(kernels)


def hooked(module):
    """Let a forward hook keep the types of what a module returns."""
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    return seen


def test_hooks_of_the_activation_see_its_output(kernels):
    model = Gated(nn.SiLU())
    seen = hooked(model.act_fn)
    with torch.no_grad():
        check(model, torch.randn(4, 3))
    assert seen == [torch.Tensor] * (PASSES + 1)
    assert not kernels


def test_hooks_that_come_later(kernels):
    model, x = Gated(nn.SiLU()), torch.randn(4, 3)
    with torch.no_grad(), fe.collect(model) as collector:
        *_, expected = [model(x) for _ in range(4)]
        for module in (model.act_fn, model.up_proj):
            seen = hooked(module)
            assert torch.equal(model(x), expected)
            assert seen == [torch.Tensor]
    assert kernels == [True] * 2
    assert torch.equal(collector.compute()["act_fn"].counts, 6 * plain_counts(model.gate_proj(x), 1))


def test_output_that_is_used_again(kernels):
    with torch.no_grad():
        check(Twice(nn.SiLU()), torch.randn(4, 3))
    assert not kernels


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_that_are_not_fused(dtype, kernels):
    with torch.no_grad():
        check(Gated(nn.SiLU()).to(dtype), torch.randn(4, 3).to(dtype))
    assert not kernels


def test_gate_of_another_shape(kernels):
    with torch.no_grad():
        check(Gated(nn.SiLU(), up=1), torch.randn(4, 3))
    assert kernels == [False] * (PASSES - 2)


def test_gate_of_another_dtype(kernels):
    class Mixed(Gated):
        def forward(self, x):
            wide = x.double()
            return self.act_fn(self.gate_proj(x)) * self.up_proj(wide)

    model = Mixed(nn.SiLU())
    model.up_proj.double()
    with torch.no_grad():
        check(model, torch.randn(4, 3))
    assert kernels == [False] * (PASSES - 2)


def test_error_that_the_model_catches(kernels):
    model, x = Forgiving(nn.SiLU()), torch.randn(4, 3)
    with torch.no_grad():
        check(model, x)
        assert kernels == [True] * (PASSES - 2)
        model.up_proj = nn.Linear(5, 7)
        check(model, x)
    assert kernels == [True] * (PASSES - 2) + [False] * (PASSES - 2)


def test_error_leaves_nothing():
    model, x = Gated(nn.SiLU()), torch.randn(4, 3)
    with torch.no_grad(), fe.collect(model) as collector:
        for _ in range(4):
            model(x)
        model.up_proj.in_features, kept = 3, []
        model.up_proj.weight.data = torch.randn(7, 5)
        hook = model.gate_proj.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
        with pytest.raises(RuntimeError):
            model(x)
        hook.remove()
    assert kept[0]() is None
    assert torch.equal(collector.compute()["act_fn"].counts, 4 * plain_counts(model.gate_proj(x), 1))


def test_gradients(kernels):
    model, x = Gated(nn.SiLU()), torch.randn(4, 3)
    check(model, x)
    assert not kernels  # they are recorded
    model.gate_proj.requires_grad_(False)
    check(model, x)
    assert kernels == [False] * (PASSES - 2)  # those of the other factor are
    with fe.collect(model):
        for _ in range(4):
            model.zero_grad()
            model(x).sum().backward()
    ours = model.up_proj.weight.grad
    model.zero_grad()
    model(x).sum().backward()
    assert torch.equal(ours, model.up_proj.weight.grad)


def test_padding_is_left_out(kernels):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Gated(nn.SiLU())

        def forward(self, x, attention_mask):
            return self.mlp(x)

    model, x, mask = Masked(), torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad(), fe.collect(model) as collector:
        for _ in range(PASSES):
            model(x, mask)
    expected = PASSES * plain_counts(model.mlp.gate_proj(x)[mask.bool()], 1)
    assert torch.equal(collector.compute()["mlp.act_fn"].counts, expected)
    assert not kernels


def test_entropies_of_batches(kernels):
    with torch.no_grad():
        check(Gated(nn.SiLU()), torch.randn(4, 3), average="batch")
    assert all(kernels)


class Overwriting(nn.Linear):
    """Changes its input in place after it has read it."""

    def forward(self, x):
        y = super().forward(x)
        x.neg_()
        return y


class Delegating(nn.Module):
    """Calls the forward of another module of its class, which shares the activation."""

    def __init__(self, inner=None):
        super().__init__()
        self.act = inner.act if inner else nn.SiLU()
        self.up = nn.Linear(3, 3) if inner else Overwriting(3, 3)
        self.inner = inner

    def forward(self, x):
        if self.inner is not None:
            return self.inner.forward(x)
        return self.act(x) * self.up(x)


class Replacing(Delegating):
    """Goes on as another module of its class, which shares the activation."""

    def forward(self, x):
        if self.inner is not None:
            self = self.inner
        return self.act(x) * self.up(x)


@pytest.mark.parametrize("kind", [Delegating, Replacing])
def test_code_that_runs_for_another_module(kind):
    model, x = kind(kind()), torch.randn(4, 3)
    with torch.no_grad():
        expected = model(x.clone())
        with fe.collect(model) as collector:
            for _ in range(PASSES):
                assert torch.equal(model(x.clone()), expected)
    (statistics,) = collector.compute().values()
    assert torch.equal(statistics.counts, PASSES * plain_counts(x, 1))


def test_excluded_site(kernels):
    model, x = Gated(nn.SiLU()), torch.randn(4, 3)
    with torch.no_grad(), fe.collect(model, exclude=["act_fn"]):
        outputs = [model(x) for _ in range(4)]
    assert torch.equal(outputs[-1], model(x))
    assert not kernels
