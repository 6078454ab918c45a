"""Code of the user that a collector must neither change nor overlook: operators, methods, threads, encoders, subclasses."""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from tests._helpers.networks import Reads
from tests._helpers.statistics import counted

pytestmark = pytest.mark.filterwarnings("ignore:.*fe.isolate", "ignore:.*default axis")
X = torch.randn(8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_higher_order_operators(inside):
    def cond(x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))

    model = Reads(lambda m, x: m.act(cond(m.fc(x))), fc=nn.Linear(4, 6), act=nn.ReLU())
    expected = model(X)
    with fe.collect(model) as collector:
        for _ in range(2):
            assert torch.equal(model(X), expected)
        if not inside:
            cond(X)
    assert counted(collector) == {"act": 96}


class Methods(nn.Module):
    """Methods of all kinds that call an activation as a function and are called from outside."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.bound = MethodType(lambda self, x: F.silu(self.fc(x)), self)

    @torch.no_grad()
    def decorated(self, x):
        return F.gelu(self.fc(x))

    @property
    def scale(self):
        return F.softplus(self.fc.weight * 1.0)

    @functools.cached_property
    def cached(self):
        return F.softplus(self.fc.weight * 1.0)

    @staticmethod
    def static(layer, x):
        return F.elu(layer(x))

    def forward(self, x):
        return F.relu(self.fc(x))


CALLS = {
    "decorated": (lambda m: m.decorated(X), {"gelu": 48}),
    "property": (lambda m: m.scale, {"softplus": 24}),
    "cached property": (lambda m: m.cached, {"softplus": 24}),
    "bound function": (lambda m: m.bound(X), {"silu": 48}),
    "static method": (lambda m: m.static(m.fc, X), {"elu": 48}),
    "lambda": (lambda m: F.mish(m.fc(X)), {"mish": 48}),
    "own code": (lambda m: F.mish(m.fc(X) + 1), {}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("in_thread", [False, True])
def test_functions_in_code_that_is_called_from_outside(call, in_thread):
    model, (run, expected) = Methods(), CALLS[call]
    with ThreadPoolExecutor(1) as pool, fe.collect(model) as collector:
        model(X)
        if in_thread:
            pool.submit(model.fc, X).result()
            pool.submit(run, model).result()
        else:
            run(model)
    assert counted(collector) == {"relu": 48} | expected


def test_functions_in_a_thread_that_the_forward_starts():
    with ThreadPoolExecutor(1) as pool:
        model = Reads(lambda m, x: pool.submit(lambda: F.gelu(m.fc(x))).result(), fc=nn.Linear(4, 6))
        with fe.collect(model) as collector:
            model(X)
    assert counted(collector) == {"gelu": 48}


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs(layout):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 5)], layout=layout)
    with fe.collect(model) as collector:
        model(x)
        model(x)
    assert counted(collector) == {"1": 84}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("mode", ["eval", "train", "with gradients", "right aligned"])
def test_encoder_returns_at_padding_what_it_returned_before(norm, mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8) if norm else None).train(mode == "train")
        if norm:
            nn.init.normal_(model.norm.bias)
        x, padding = torch.randn(2, 5, 8), torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()
        padding = padding.flip(1) if mode == "right aligned" else padding
        with torch.set_grad_enabled(mode == "with gradients"):
            expected = model(x, src_key_padding_mask=padding)
            with fe.collect(model):
                y = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y, expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_another_activation_under_a_name_is_noted():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with fe.collect(model) as collector:
        model(X)
        model[1] = nn.SiLU()
        with pytest.warns(UserWarning, match="site '1' was relu and is silu now; the counts of both are added up"):
            model(X)
    assert counted(collector) == {"1": 96}
    assert len(collector.compute().notes) == 1


def test_module_that_was_replaced_is_counted_no_longer():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with fe.collect(model) as collector:
        model(X)
        old, model[1] = model[1], nn.ReLU()
        old(torch.randn(3, 9))
        model(X)
    assert counted(collector) == {"1": 96}


class Logged(torch.Tensor):
    """A tensor that notes every function that is called with it."""

    log = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.log.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclass_sees_the_functions_of_the_model_alone():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), X.as_subclass(Logged)
    logs = []
    with fe.collect(model) as collector:
        model(X)
        for attached in (True, False):
            Logged.log.clear()
            model(x)
            logs.append(list(Logged.log))
            if attached:
                collector.detach()
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": 3}, "mask: got 3, expected the name of an argument"),
        ({"channel_axis": {"1": "1"}}, "channel_axis: got {'1': '1'}, expected axes by site"),
        ({"exclude": 5}, "exclude: got 5, expected a list of names or patterns"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        fe.collect(nn.ReLU(), **options)


def test_nothing_counted_says_why():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with fe.collect(model, exclude=["*"]) as collector:
        model(X)
    with pytest.raises(RuntimeError, match=r"all sites that ran are left out \(1\); see exclude="):
        collector.compute()
