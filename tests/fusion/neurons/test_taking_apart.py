"""Constant neurons are cut out of the operators around them, exactly, and the activations left are plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.neurons.taking_apart import take_apart
from fastentropy.fusion.tracing import export, prepared_module
from tests._helpers.fusing import assert_equal
from tests._helpers.neuronwise_networks import images, neuronwise


def apart(model, x, dynamic_sizes=False):
    """Return the trace of a model taken apart, after comparing what it computes."""
    taken = take_apart(prepared_module(export(model.eval(), Inputs((x,)), dynamic_sizes)))
    for batch in (1, 2, 5):
        given = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(taken.network(given), model(given.clone()), rtol=1e-5, atol=1e-5)
    return taken


def targets(network):
    """Return the operators of a graph in call order."""
    return [str(node.target).split(".")[1] for node in network.graph.nodes if node.op == "call_function"]


def test_constant_neurons_are_cut_out_of_linear_layers():
    model = nn.Sequential(nn.Linear(3, 5), neuronwise("aclca", values=[0.0, 2.0, 0.0, -1.0, 0.0]), nn.Linear(5, 2))
    taken = apart(model, torch.randn(4, 3))
    assert targets(taken.network) == ["linear", "clamp_min", "linear"]
    assert taken.neurons == {"1": {"active": 2, "linear": 1, "constant": 2, "cut": 2, "split": 0}}
    assert taken.multiplications == {"before": 4 * (15 + 10), "after": 4 * (9 + 6)}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ("aaa", ["linear", "relu", "linear"]),
        ("lll", ["linear", "linear"]),
        ("aca", ["linear", "relu", "linear"]),
        ("lcl", ["linear", "linear"]),
        ("ala", ["linear", "clamp_min", "linear"]),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_activations_of_all_or_no_neurons_are_plain(states, expected, inplace):
    model = nn.Sequential(nn.Linear(3, 3), neuronwise(states, nn.ReLU(inplace)), nn.Linear(3, 2))
    assert targets(apart(model, torch.randn(4, 3)).network) == expected


def test_neurons_that_are_all_linear_are_a_chain():
    model = nn.Sequential(nn.Linear(3, 30), neuronwise("l" * 20 + "c" * 10, nn.GELU()), nn.Linear(30, 2)).eval()
    fused = fe.fuse(model, (torch.randn(4, 3),), measure=False)
    assert [(chain.names, chain.choice) for chain in fused.report.chains] == [(("0", "2"), "merge")]


def test_one_channel_stays_where_all_are_constant():
    model = nn.Sequential(nn.Linear(3, 4), neuronwise("cccc", values=[1.0, 2.0, 3.0, 4.0]), nn.Linear(4, 2))
    taken = apart(model, torch.randn(4, 3))
    assert taken.neurons["1"]["cut"] == 3


def test_a_relu6_has_bounds_on_both_sides():
    model = nn.Sequential(nn.Linear(3, 5), neuronwise("alala", nn.ReLU6()), nn.Linear(5, 2))
    nn.init.normal_(model[0].weight, std=9)
    assert targets(apart(model, torch.randn(4, 3)).network) == ["linear", "clamp_min", "clamp_max", "linear"]


def test_other_activations_are_chosen_by_one_mask():
    model = nn.Sequential(nn.Linear(3, 5), neuronwise("alaca", nn.GELU()), nn.Linear(5, 2))
    assert targets(apart(model, torch.randn(4, 3)).network) == ["linear", "gelu", "where", "linear"]


class Leaky(nn.Module):
    """An activation of several operators."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.1 * x)


def test_activations_of_several_operators():
    layers = nn.Linear(3, 5), neuronwise("alaca", Leaky()), nn.Linear(5, 4), neuronwise("ccla", Leaky(), [1.0, -1.0, 0.0, 0.0])
    taken = apart(nn.Sequential(*layers, Leaky(), nn.Linear(4, 2)), torch.randn(4, 3))
    assert [states["cut"] for states in taken.neurons.values()] == [1, 2]


@pytest.mark.parametrize("dynamic_sizes", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 3, stride=2, padding=(2, 1), dilation=2)])
def test_what_a_constant_adds_ends_at_the_padding(layer, dynamic_sizes):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), images("acac", values=[0.0, 2.0, 0.0, -1.0]), layer)
    taken = apart(model, torch.randn(2, 2, 9, 7), dynamic_sizes)
    assert taken.neurons["1"]["cut"] == 2
    assert_equal(taken.network, model, torch.randn(3, 2, 9, 7))
    if dynamic_sizes:
        assert_equal(taken.network, model, torch.randn(3, 2, 12, 11))


def test_a_constant_goes_on_through_depthwise_operators_and_further_activations():
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.bias)
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), images("acca"), depthwise, norm, nn.ReLU6(), nn.Conv2d(4, 3, 1))
    taken = apart(model, torch.randn(2, 2, 6, 5))
    assert taken.multiplications == {"before": 2 * 30 * (8 + 36 + 12), "after": 2 * 30 * (4 + 18 + 6)}


def test_a_constant_that_meets_padding_in_a_depthwise_operator_stays():
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    activation = images("acca", values=[0.0, 1.0, 0.0, 0.0])
    taken = apart(nn.Sequential(nn.Conv2d(2, 4, 1), activation, depthwise, nn.Conv2d(4, 3, 1)), torch.randn(2, 2, 6, 5))
    assert taken.neurons["1"]["cut"] == 1


def test_groups_are_cut_out_as_a_whole():
    grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), images("ccacaa"), grouped, nn.ReLU(), nn.Conv2d(6, 3, 1))
    assert apart(model, torch.randn(2, 2, 6, 5)).neurons["1"]["cut"] == 2


def test_features_of_an_image_are_cut_out_of_the_layer_behind():
    layers = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 6, 3)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), images("acca", values=[0.0, 3.0, 0.0, 0.0]), *layers)
    taken = apart(model, torch.randn(2, 2, 6, 4))
    assert taken.multiplications["after"] * 2 == taken.multiplications["before"]


class Gated(nn.Module):
    """A gated MLP."""

    def __init__(self, activation):
        super().__init__()
        self.both, self.down, self.activation = nn.Linear(3, 8), nn.Linear(4, 3), activation

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return x + self.down(self.activation(gate) * up)


def test_a_gate_that_is_zero_cuts_both_halves():
    taken = apart(Gated(neuronwise("acac", nn.SiLU())), torch.randn(2, 5, 3))
    assert taken.multiplications == {"before": 10 * (24 + 12), "after": 10 * (12 + 6)}
    taken = apart(Gated(neuronwise("acac", nn.SiLU(), [0.0, 1.0, 0.0, 0.0])), torch.randn(2, 5, 3))
    assert taken.neurons["activation"]["cut"] == 1


class Added(nn.Module):
    """Add a value to what is computed from it."""

    def __init__(self, first, second, function=torch.add):
        super().__init__()
        self.first, self.layer, self.second, self.last = first, nn.Linear(4, 4), second, nn.Linear(4, 2)
        self.function = function
        self.embed = nn.Linear(3, 4)

    def forward(self, x):
        y = self.first(self.embed(x))
        return self.last(self.function(y, self.second(self.layer(y))))


def test_a_sum_loses_the_channels_that_are_constant_in_both_branches():
    taken = apart(Added(neuronwise("accc"), neuronwise("caca")), torch.randn(2, 3))
    assert taken.neurons["first"]["cut"] == taken.neurons["second"]["cut"] == 1
    taken = apart(Added(neuronwise("accc"), neuronwise("caca"), torch.mul), torch.randn(2, 3))
    assert taken.neurons["first"]["cut"] == taken.neurons["second"]["cut"] == 3


class Reader(nn.Module):
    """Read the outputs of an activation in another way, too."""

    def __init__(self, read):
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(3, 4), neuronwise("acca", nn.ReLU(inplace=True)), nn.Linear(4, 2)
        self.read = read

    def forward(self, x):
        y = self.activation(self.first(x))
        return self.last(y) + self.read(y)


@pytest.mark.parametrize(
    "read",
    [
        lambda y: F.layer_norm(y, (4,)).sum(-1, keepdim=True),
        lambda y: y.softmax(-1)[:, :2],
        lambda y: y.reshape(-1, 2, 2).sum(1),
        lambda y: y.cumsum(0)[:, 2:],
        lambda y: (y @ y.T).sum(-1, keepdim=True),
        lambda y: torch.stack([y, y]).sum((0, 2))[:, None],
    ],
)
def test_all_channels_stay_for_other_readers(read):
    assert apart(Reader(read), torch.randn(2, 3)).neurons["activation"]["cut"] == 0


def test_outputs_of_the_model_stay_and_are_new_memory():
    for states in ("acl", "lll", "ccc"):
        taken = apart(neuronwise(states, nn.ReLU(inplace=True)), torch.randn(2, 3))
        x = torch.randn(2, 3)
        y = taken.network(x)
        if states == "lll":
            assert y.data_ptr() != x.data_ptr()


class Overwritten(nn.Module):
    """Overwrite the output of an activation whose input is read again."""

    def __init__(self):
        super().__init__()
        self.layer, self.activation = nn.Linear(3, 4), neuronwise("llll")

    def forward(self, x):
        y = self.layer(x)
        z = self.activation(y)
        z += 1
        return y.exp() * z


def test_a_value_that_is_overwritten_is_copied():
    apart(Overwritten(), torch.randn(2, 3))


def test_a_network_without_masks_is_left_alone():
    traced = prepared_module(export(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), Inputs((torch.randn(2, 3),))))
    assert take_apart(traced) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layers = nn.Conv2d(2, 6, 3, padding=1), images("aclcal", nn.ReLU6(), [0.0, 0.5] * 3), nn.Conv2d(6, 3, 3, padding=1)
    model = nn.Sequential(*layers).to(dtype).eval()
    fused = fe.fuse(model, (torch.randn(2, 2, 6, 5, dtype=dtype),), measure=False)
    assert fused.report.choice == "fused"
    assert fused.report.neurons["1"]["cut"] == 2


def test_report_and_files(tmp_path):
    layers = nn.Conv2d(2, 6, 3, padding=1), images("aclcal", values=[0.0, 0.5] * 3), nn.Conv2d(6, 3, 3, padding=1)
    model = nn.Sequential(*layers).eval()
    fused = fe.fuse(model, (torch.randn(2, 2, 6, 5),), measure=False)
    assert "2 neurons cut out, 0 linear on paths of their own: 0.01 of 0.02 M multiplications left" in str(fused.report)
    assert fe.FusionReport.from_dict(fused.report.to_dict()) == fused.report
    fused.save(tmp_path / "model.pt2")
    loaded = fe.load(tmp_path / "model.pt2")
    assert loaded.report == fused.report
    assert_equal(loaded, model, torch.randn(5, 2, 6, 5))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "onnxruntime"])
def test_backends(backend):
    if backend == "onnxruntime":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    layers = nn.Conv2d(2, 6, 3, padding=1), images("aclcal", nn.ReLU6(), [0.0, 0.5] * 3), nn.Conv2d(6, 3, 3, padding=1)
    model = nn.Sequential(*layers).eval()
    fused = fe.fuse(model, (torch.randn(2, 2, 6, 5),), measure=False, backend=backend)
    assert fused.report.choice == "fused"
    assert_equal(fused, model, torch.randn(5, 2, 6, 5))


@pytest.mark.slow
def test_package(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), neuronwise("aclca"), nn.Linear(5, 2)).eval()
    fe.fuse(model, (torch.randn(4, 3),), measure=False).save_package(tmp_path / "model.pt2")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    assert_equal(loaded, model, torch.randn(5, 3))


def test_the_default_device_and_dtype_do_not_matter():
    layers = nn.Conv2d(2, 6, 3, padding=1), images("aclcal", values=[0.0, 0.5] * 3), nn.Conv2d(6, 3, 3, padding=1)
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 2, 6, 5)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        fused = fe.fuse(model, (x,), measure=False)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert fused.report.neurons["1"]["cut"] == 2
    assert_equal(fused, model, torch.randn(5, 2, 6, 5))


class Shuffled(nn.Module):
    """Shuffle the channels of an activation by views, which may be read in between."""

    def __init__(self, reads_between=False, dims=(1, 2)):
        super().__init__()
        self.first, self.activation, self.last = nn.Conv2d(2, 6, 1), images("aclcla"), nn.Conv2d(6, 3, 1)
        self.reads_between, self.dims = reads_between, dims

    def forward(self, x):
        split = self.activation(self.first(x)).view(x.shape[0], 2, 3, *x.shape[2:])
        y = self.last(split.transpose(*self.dims).contiguous().view(x.shape[0], 6, *x.shape[2:]))
        return y + split.amax((1, 2)).unsqueeze(1) if self.reads_between else y


def test_channels_are_cut_out_of_shuffles_by_views():
    taken = apart(Shuffled(), torch.randn(2, 2, 4, 4))
    assert taken.neurons["activation"]["cut"] == 2
    assert "view" not in targets(taken.network)


@pytest.mark.parametrize("options", [{"reads_between": True}, {"dims": (3, 4)}, {"dims": (1, 3)}])
def test_channels_stay_that_are_read_while_split_up(options):
    assert apart(Shuffled(**options), torch.randn(2, 2, 4, 4)).neurons["activation"]["cut"] == 0
