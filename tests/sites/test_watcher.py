import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import Site, find_sites
from fastentropy.sites.observer import NoObserver
from fastentropy.sites.watcher import SiteWatcher
from tests._helpers.networks import Reads
from tests._helpers.snapshots import assert_unchanged, snapshot


@pytest.fixture(params=[torch.no_grad, torch.inference_mode, torch.enable_grad])
def axis_of(request):
    """The neuron axis and its size of a model with one site, found in each of the modes that people run models in."""

    def find(model, *inputs):
        watcher = SiteWatcher(model, NoObserver())
        watcher.attach()
        with request.param():
            model(*inputs)
        watcher.detach()
        (site,) = watcher.sites.values()
        return site.channel_axis, site.neurons

    return find


def test_sites_come_in_call_order_with_their_activation(network, images):
    assert find_sites(network, (images,)) == [
        Site("relu1", "relu", 6, 1),
        Site("relu2", "relu", 6, 1),
        Site("gelu", "gelu", 8, 1),
    ]


def test_finding_sites_changes_nothing(network, images):
    before, random = snapshot(network), torch.get_rng_state()
    find_sites(network, (images,))
    assert_unchanged(network, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_finding_sites_changes_nothing_when_the_model_raises(network):
    before = snapshot(network)
    with pytest.raises(RuntimeError):
        find_sites(network, (torch.zeros(1, 2, 5, 5),))
    assert_unchanged(network, before)


def test_buffers_that_the_model_updates_are_left_as_they_were():
    def forward(m, x):
        m.calls += 1
        return m.relu(m.fc(x))

    model = Reads(forward, fc=nn.Linear(2, 2), relu=nn.ReLU())
    model.register_buffer("calls", torch.zeros(()))
    find_sites(model, (torch.zeros(1, 2),))
    assert model.calls == 0


def test_a_buffer_that_the_model_replaces_is_put_back():
    def forward(m, x):
        m.calls = m.calls + 1
        return m.relu(m.fc(x))

    model = Reads(forward, fc=nn.Linear(2, 2), relu=nn.ReLU())
    model.register_buffer("calls", torch.zeros(()))
    before = model.calls
    find_sites(model, (torch.zeros(1, 2),))
    assert model.calls is before
    assert model.calls == 0


def test_further_calls_of_a_module_are_sites_of_their_own():
    model = Reads(lambda m, x: m.relu(m.fc(m.relu(m.fc(x)))), fc=nn.Linear(3, 3), relu=nn.ReLU())
    assert [site.name for site in find_sites(model, (torch.zeros(2, 3),))] == ["relu", "relu:1"]


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv1d(3, 5, 3), (2, 3, 7), (1, 5)),
        (nn.Conv2d(3, 5, 3), (2, 3, 7, 7), (1, 5)),
        (nn.ConvTranspose2d(3, 5, 3), (2, 3, 7, 7), (1, 5)),
        (nn.Conv3d(3, 5, 3), (2, 3, 7, 7, 7), (1, 5)),
        (nn.Linear(3, 5), (2, 3), (1, 5)),
        (nn.Linear(3, 5), (2, 4, 3), (2, 5)),
        (nn.Linear(3, 5), (2, 4, 6, 3), (3, 5)),
        (nn.BatchNorm1d(5), (2, 5, 7), (1, 5)),
        (nn.GroupNorm(1, 6), (2, 6, 3, 4), (1, 6)),
        (nn.LayerNorm(5), (2, 3, 4, 5), (3, 5)),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.Dropout()), (2, 3, 9, 9), (1, 5)),
    ],
)
def test_neuron_axis_follows_from_the_operator_before(axis_of, layer, shape, expected):
    assert axis_of(nn.Sequential(layer, nn.ReLU()), torch.randn(shape)) == expected


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda y: y.permute(0, 2, 3, 1), (3, 5)),
        (lambda y: y.permute(0, 2, 3, 1).contiguous(), (3, 5)),
        (lambda y: y.transpose(1, 2), (2, 5)),
        (lambda y: y.flatten(2), (1, 5)),
        (lambda y: y + torch.randn_like(y), (1, 5)),
        (lambda y: y.add_(y), (1, 5)),
        (lambda y: torch.cat([y, y], dim=1), (1, 10)),
        (lambda y: y[:, :, 1:, :2], (1, 5)),
        (lambda y: F.interpolate(y, scale_factor=2), (1, 5)),
        (lambda y: y.to(torch.float64), (1, 5)),
        (lambda y: y.unsqueeze(2), (1, 5)),
        (lambda y: y.movedim(1, -1), (3, 5)),
        (lambda y: y.permute(0, 2, 3, 1).reshape(-1, 5), (1, 5)),
    ],
)
def test_neuron_axis_is_followed_through_other_operators(axis_of, between, expected):
    model = Reads(lambda m, x: m.relu(between(m.conv(x))), conv=nn.Conv2d(3, 5, 3), relu=nn.ReLU())
    assert axis_of(model, torch.randn(2, 3, 6, 7)) == expected


@pytest.mark.parametrize(("shape", "expected"), [((2, 3), (1, 3)), ((2, 4, 3), (2, 3)), ((2, 3, 4, 5), (1, 3))])
def test_an_input_of_unknown_origin_is_an_image_or_tokens(axis_of, shape, expected):
    assert axis_of(nn.Sequential(nn.ReLU()), torch.randn(shape)) == expected
