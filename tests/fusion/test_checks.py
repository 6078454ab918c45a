"""Models that `fuse` refuses: the message names the cause and what mends it, in one line, and the model stays as it was."""

import threading
from unittest.mock import patch

import pytest
import torch
from torch import nn

from fastentropy import fuse
from fastentropy.fusion.checks import default_tolerance
from tests._helpers.fusing import assert_equal
from tests._helpers.networks import Reads
from tests._helpers.snapshots import assert_unchanged, snapshot

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def layers(*between):
    """A network of two linear layers with other modules between them, in eval mode."""
    return nn.Sequential(nn.Linear(8, 32), *between, nn.Linear(32, 4)).eval()


def refusal(model, *inputs):
    """The message with which `fuse` refuses a model, which must be one line and leave the model alone."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\w") as raised:
        fuse(model, inputs or (X,), measure=False)
    assert_unchanged(model, before)
    assert "\n" not in str(raised.value)
    return str(raised.value)


class Noisy(nn.Module):
    """A module that asks for its mode where its forward does not show it."""

    def forward(self, x):
        return self.noise(x)

    def noise(self, x):
        return x + torch.rand_like(x) if self.training else x


PARTLY = "the model is in eval mode, but these of its modules are in training mode: "


@pytest.mark.parametrize(
    "module",
    [nn.Dropout(0.5), nn.AlphaDropout(0.3), nn.BatchNorm1d(32), nn.RReLU(), Noisy()],
    ids=lambda module: type(module).__name__,
)
def test_submodule_in_training_mode_is_named(module):
    model = layers(module)
    module.train()
    assert refusal(model) == f"{PARTLY}1 ({type(module).__name__}); call model.eval() first"


def test_first_submodules_in_training_mode_are_named():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Dropout()) for _ in range(5)]).eval()
    for layer in model:
        layer[1].train()
    assert refusal(model) == f"{PARTLY}0.1 (Dropout), 1.1 (Dropout), 2.1 (Dropout) and 2 more modules; call model.eval() first"


@pytest.mark.parametrize("module", [nn.Linear(32, 32), nn.Dropout(0.0), nn.Identity(), nn.LayerNorm(32), Noisy()])
def test_submodule_whose_mode_does_not_matter(module):
    """A layer that was put in after `model.eval()` is in training mode, and computes the same."""
    model = layers(module)
    module.train(not isinstance(module, Noisy))
    mode = module.training
    assert_equal(fuse(model, (X,), measure=False), model, torch.randn(5, 8))
    assert module.training == mode


def test_whole_model_in_training_mode():
    assert refusal(layers(nn.Dropout()).train()) == (
        "the model is in training mode, where batch norm and dropout are not linear; call model.eval() first"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = layers()
    with torch.autocast("cpu", dtype):
        text = refusal(model)
        with torch.autocast("cpu", enabled=False):
            fuse(model, (X,), measure=False)
    assert text == (
        f"torch.autocast is active for cpu ({dtype}), and the model computes something else under it; fuse outside of it, "
        f"after model.to({dtype}) for a result in this precision"
    )


def test_autocast_inside_of_the_model():
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.b(m.a(x)).float()

    model = Reads(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 4)).eval()
    assert_equal(fuse(model, (X,), measure=False), model, X, tolerance=5e-2)


def test_attribute_that_cannot_be_copied_is_named():
    model = layers(nn.Identity())
    model[1].lock = threading.Lock()
    assert refusal(model) == (
        "Sequential cannot be copied by copy.deepcopy: cannot pickle '_thread.lock' object; it is model.1.lock: take it away, "
        "or give its class a __deepcopy__"
    )
    model = layers()
    model.cache = {"scaled": [model[0].weight * 2]}
    assert refusal(model).endswith("; it is model.cache: take it away, or give its class a __deepcopy__")


def test_model_on_several_devices():
    assert refusal(nn.DataParallel(layers()).eval()) == (
        "DataParallel runs the model on several devices; fuse the model in it: model.module"
    )


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match=r"^the model has lazy modules without weights; call it once before it is fused$"):
        fuse(model, (X,))
    model(X)
    assert_equal(fuse(model, (X,), measure=False), model, X)


def test_exported_model_has_no_eval():
    """Neither the model, which is in training mode by its flag, nor its parts are refused."""
    model = layers(nn.Dropout(), nn.Identity())
    exported = torch.export.export(model, (X,)).module()
    assert exported.training
    assert_equal(fuse(exported, (X,), measure=False), model, X)
    assert exported.training


def test_branch_by_the_values_of_a_tensor():
    model = Reads(lambda m, x: m.a(x) if x.sum() > 0 else -m.a(x), a=nn.Linear(8, 4)).eval()
    text = refusal(model)
    assert text.startswith("torch.export cannot trace Reads: ")
    assert text.endswith("; it takes a branch by the value of a tensor, see torch.cond")


def test_random_model_is_told_from_a_wrong_trace():
    with pytest.raises(RuntimeError, match="two calls of the model differ as well: it draws random numbers") as raised:
        fuse(Reads(lambda m, x: m.a(x) + torch.rand_like(x), a=nn.Linear(8, 8)).eval(), (X,), measure=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ([torch.float32, torch.float32], 1e-5),
        ([torch.float64, torch.float32], 1e-10),
        ([torch.bfloat16, torch.float32], 5e-2),
        ([torch.float16, torch.float32], 1e-2),
    ],
)
def test_default_tolerance_follows_most_weights(dtypes, tolerance):
    large, small = nn.Linear(9, 9).to(dtypes[0]), nn.Linear(2, 2).to(dtypes[1])
    assert default_tolerance(nn.Sequential(small, large)) == tolerance
    assert default_tolerance(nn.ReLU()) == 1e-5


def test_modes_are_only_compared_where_they_are_mixed():
    calls = []
    model = Reads(lambda m, x: calls.append(len(x)) or m.b(m.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval()
    with patch("fastentropy.fusion.api.export", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        fuse(model, (X,))
    assert calls == [3]
