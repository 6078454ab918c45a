"""The cases of `fastentropy bench`: the operations measured side by side do what their names say."""

import functools
import gc
import shutil
import weakref

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.benchmarks import collecting, fusing, kernels, networks
from fastentropy.benchmarks.baselines import count_in_pytorch, published_entropy
from fastentropy.benchmarks.memory import peak_bytes
from fastentropy.sites.activations import activation_modules
from fastentropy_kernels.states import reference
from tests._helpers.networks import Residual

CPU = torch.device("cpu")
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


# The kernels ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensors(monkeypatch):
    """Return lists of the random tensors and of the counts that cases make."""
    made = {"randn": [], "zeros": []}

    def kept(function, into):
        def call(*args, **options):
            into.append(function(*args, **options))
            return into[-1]

        return call

    for name, into in made.items():
        monkeypatch.setattr(torch, name, kept(getattr(torch, name), into))
    return made


@pytest.mark.parametrize("layout", kernels.LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "operation",
    [
        "activation_states",
        "count_states",
        "PyTorch counting",
        pytest.param("torch.compile", marks=[needs_a_compiler, pytest.mark.slow]),
    ],
)
def test_kernel_case_operations_count_the_same(tensors, layout, dtype, operation):
    case = kernels.kernel_case(CPU, dtype, layout, 3000, "relu")
    (x,), (counts, *_) = tensors["randn"], tensors["zeros"]
    case.operations[operation]()
    expected = torch.zeros_like(counts)
    reference.add_states(x, expected, channel_axis=layout.channel_axis)
    assert expected.sum() == x.numel()
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_which_operations_run_the_activation(tensors, monkeypatch, activation):
    calls, function = [], kernels.ACTIVATIONS[activation]
    monkeypatch.setitem(kernels.ACTIVATIONS, activation, lambda x: calls.append(1) or function(x))
    case = kernels.kernel_case(CPU, torch.float32, kernels.LAYOUTS[0], 3000, activation)
    (x,) = tensors["randn"]
    assert torch.equal(case.operations["copy"](), x)
    assert not calls
    assert torch.equal(case.operations["activation alone"](), function(x))
    assert torch.allclose(case.operations["activation_states"](), function(x))
    calls.clear()
    for name in ("PyTorch counting", "published procedure", "histogram observer"):
        case.operations[name]()
    assert len(calls) == 3


def test_sizes_are_the_bytes_to_move():
    case = kernels.kernel_case(CPU, torch.bfloat16, kernels.LAYOUTS[0], 4096, "relu")
    assert case.sizes["copy"] == case.sizes["activation_states"] == 2 * 2 * 4096
    assert case.sizes["count_states"] == 2 * 4096


def test_baselines_run_at_the_largest_size_only():
    cases = list(kernels.kernel_cases(CPU, [torch.float32], [2**20, 2**12]))
    with_baselines = [case.name for case in cases if case.baselines]
    assert with_baselines == ["relu on rows, 1024 × 1024, float32", "relu on planes, 5 × 64 × 56 × 56, float32"]
    assert [case.name for case in cases if case.name.startswith("silu")] == ["silu on rows, 1024 × 1024, float32"]
    assert all(
        set(case.operations) == set(kernels.OPERATIONS) - (set() if case.baselines else kernels.BASELINES) for case in cases
    )


def test_sizes_rounded_to_one_shape_are_one_case():
    names = [case.name for case in kernels.kernel_cases(CPU, [torch.float32], [1000, 2000, 4000])]
    assert len(set(names)) == len(names) == 4  # rows of 1 and 3, planes of 1, silu


def test_tensors_of_a_case_are_freed_before_the_next(tensors):
    cases = kernels.kernel_cases(CPU, [torch.float32], [2**12, 2**14])
    next(cases)
    x = weakref.ref(tensors["randn"].pop())
    next(cases)
    assert x() is None


def test_cuda_graphs_leave_out_baselines():
    case = kernels.kernel_case(CPU, torch.float32, kernels.LAYOUTS[0], 4096, "relu")
    graphs = kernels._as_graphs(case, torch.device("cuda"))
    assert set(graphs.operations) == set(kernels.OPERATIONS) - kernels.BASELINES
    assert all(each["cuda_graph"] for each in graphs.facts.values())
    assert graphs.name != case.name


def test_published_entropy_formula():
    """With one position per neuron it is the mean of the neurons' entropies, where zero counts as on."""
    x = torch.tensor([[1.0, -1.0, 0.0], [2.0, 3.0, -0.0], [-1.0, 1.0, 5.0], [-2.0, 2.0, 1.0]])
    p = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    entropy = -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)
    assert published_entropy(x) == pytest.approx(float((entropy / torch.log(torch.tensor(2.0))).mean()), abs=1e-6)


def test_published_entropy_neuron_axis():
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert published_entropy(images) == pytest.approx(published_entropy(images.permute(0, 2, 3, 1), neurons_last=True))


# Collecting -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return Residual().eval(), (torch.randn(4, 1, 5, 5),)


@pytest.mark.parametrize("procedure", [name for name in collecting.PROCEDURES if name != "compiled hooks"])
def test_procedures_keep_the_output(residual, procedure):
    model, inputs = residual
    with collecting.PROCEDURES[procedure](model) as run:
        assert torch.allclose(networks.infer(run, inputs), networks.infer(Residual.forward.__get__(model), inputs))


def test_hooks_count_what_the_collector_counts(residual):
    model, inputs = residual
    counts = {}

    def count(x, into, axis):
        count_in_pytorch(x, into, axis)
        counts[id(into)] = into

    with fe.collect(model) as collector:
        networks.infer(model, inputs)
    with collecting._counting_hooks(count, model) as run:
        networks.infer(run, inputs)
        networks.infer(run, inputs)
    expected = [site.counts for site in collector.compute().values()]
    assert len(expected) == 3
    assert all(torch.equal(ours, 2 * theirs) for ours, theirs in zip(counts.values(), expected, strict=True))


def test_published_procedure_takes_entropies_after_the_batch(residual, monkeypatch):
    model, inputs = residual
    taken, order = [], []

    def published_entropy(x, neurons_last):
        order.append("entropy")
        taken.append(x.clone())

    monkeypatch.setattr(collecting, "published_entropy", published_entropy)
    model.fc2.register_forward_hook(lambda *args: order.append("last layer"))
    seen = []
    for module in activation_modules(model).values():
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with collecting.PROCEDURES["published procedure"](model) as run:
        networks.infer(run, inputs)
    assert order == ["last layer", *["entropy"] * 3]
    assert all(torch.equal(kept, given) for kept, given in zip(taken, seen, strict=True))


def test_only_the_published_procedure_disables_inplace(residual):
    for name, enter in collecting.PROCEDURES.items():
        model = Residual().eval()
        with enter(model):
            assert model.relu1.inplace is (name != "published procedure")


@pytest.mark.slow
def test_procedures_are_independent(residual):
    """Each has its own modules, so that its changes are not in the model that the others run."""
    model, inputs = residual
    (case,) = collecting.network_cases("residual", (model, inputs), CPU)
    assert list(case.operations) == list(collecting.PROCEDURES)
    assert case.name == "residual, 4 × 1 × 5 × 5, float32"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.relu1.inplace


@needs_a_compiler
@pytest.mark.slow
def test_compiled_hooks_compile_while_collecting(residual):
    counters = torch._dynamo.utils.counters["stats"]
    for case in collecting.network_cases("residual", residual, CPU):
        case.operations["collecting"]()
        before = counters["unique_graphs"]
        case.operations["compiled hooks"]()
        assert counters["unique_graphs"] > before


@pytest.mark.slow
def test_memory_of_procedures(residual):
    (case,) = collecting.network_cases("residual", residual, CPU)
    peaks = {name: each["peak_bytes"] for name, each in case.facts.items()}
    kept = sum(4 * 4 * neurons for neurons in (6 * 25, 6 * 25, 8))
    assert peaks["published procedure"] - peaks["plain"] >= kept / 2
    assert 24 * (6 + 6 + 8) <= peaks["collecting"] - peaks["plain"] < kept / 2


@pytest.fixture
def compiled_quickly(monkeypatch):
    """What is to be compiled is, in little time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiled_quickly")
def test_compiled_operations_compute_the_same(residual):
    model, inputs = residual
    for case in collecting.compiled_cases("residual", residual):
        assert case.name == "residual, 4 × 1 × 5 × 5, float32, compiled"
        assert list(case.operations) == list(collecting.COMPILED)
        for run in case.operations.values():
            torch.testing.assert_close(run(), networks.infer(model, inputs))


@pytest.mark.usefixtures("compiled_quickly")
def test_compiled_operations_are_compiled_while_collectors_are_attached(recwarn):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    for case in collecting.compiled_cases("layers", (model.eval(), (torch.ones(2, 3),))):
        for run in case.operations.values():
            run()
            run()  # compiled anew, as the counters are now there
    assert not [str(warning.message) for warning in recwarn if "eagerly" in str(warning.message)]


@pytest.fixture
def uncompiled(monkeypatch):
    """What is to be compiled runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda run: run)


@pytest.mark.parametrize("name", ["resnet18", "llama"])
@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_collect_cases_dtypes_and_batch_sizes(monkeypatch, name):
    made = []
    monkeypatch.setitem(collecting.NETWORKS, "cpu", {name: 2})
    monkeypatch.setattr(collecting, "vision", lambda name, batch: _small(batch, made))
    monkeypatch.setitem(collecting._LLAMAS, "llama", lambda batch: _small(batch, made))
    cases = [case.name for case in collecting.collect_cases(CPU, [torch.float32, torch.bfloat16], [1, 3])]
    shapes = [f"{batch} × 1 × 5 × 5, {dtype}" for dtype in ("float32", "bfloat16") for batch in (1, 3)]
    assert cases == [f"{name}, {shape}{how}" for shape in shapes for how in ("", ", compiled")]


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_network_is_freed_before_the_next(monkeypatch):
    made = []
    monkeypatch.setitem(collecting.NETWORKS, "cpu", {"resnet18": 2})
    monkeypatch.setattr(collecting, "vision", lambda name, batch: _small(batch, made))
    for _ in collecting.collect_cases(CPU, [torch.float32], [1, 2, 3]):
        assert sum(model() is not None for model in made) == 1


def test_hooks_run_beside_a_compiled_network_without_hooks():
    x, calls = torch.randn(2, 1, 5, 5), torch.zeros(1)
    torch.compile(Residual().eval(), backend="eager")(x)
    hooked = collecting._with_own_class(Residual().eval())
    next(iter(hooked.children())).register_forward_pre_hook(lambda module, inputs: calls.add_(1) and None)
    torch.compile(hooked, backend="eager")(x)
    assert calls == 1


def _small(batch, made):
    assert not any(model() is not None for model in made)
    model = Residual().eval()
    made.append(weakref.ref(model))
    return model, (torch.randn(batch, 1, 5, 5),)


# Fusing -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    """Return a block whose activation is linearised, its inputs and its case."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Identity(), nn.Conv2d(8, 3, 1)]
    model, inputs = networks.randomize_batch_norm((nn.Sequential(*layers).eval(), (torch.randn(2, 3, 6, 6),)))
    return model, inputs, fusing.fuse_case("block", (model, inputs))


@pytest.mark.parametrize("form", [name for name in fusing.FORMS if name not in fusing.BASELINES])
def test_forms_compute_the_same_function(linear, form):
    model, inputs, case = linear
    torch.testing.assert_close(case.operations[form](), networks.infer(model, inputs), rtol=1e-4, atol=1e-4)


def test_facts_of_a_fused_network(linear):
    _, _, case = linear
    assert (case.name, case.denominator) == ("block, 2 × 3 × 6 × 6, float32", "folded")
    assert case.facts["folded"]["memory_format"] in ("contiguous", "channels_last")
    fused = case.facts["fused"]
    assert fused["multiplications"] <= fused["multiplications_folded"] == 2 * 36 * (3 * 8 + 8 * 3)
    assert fused["relative_error"] < 1e-4


@needs_a_compiler
@pytest.mark.slow
def test_frozen_baseline_has_constant_weights(linear):
    """It computes the same as the network, with the weights of the first call."""
    model, inputs, _ = linear
    run, before = networks.frozen(model), networks.infer(model, inputs)
    torch.testing.assert_close(networks.infer(run, inputs), before, rtol=1e-4, atol=1e-4)
    weight = model[3].weight.detach().clone()
    try:
        with torch.no_grad():
            model[3].weight.zero_()
        torch.testing.assert_close(networks.infer(run, inputs), before, rtol=1e-4, atol=1e-4)
    finally:
        with torch.no_grad():
            model[3].weight.copy_(weight)
        torch.compiler.reset()


def test_fuse_cases_names_and_batch_sizes(monkeypatch):
    monkeypatch.setattr(fusing, "mobilenet_blocks", lambda batch: {"block": batch})
    monkeypatch.setattr(fusing, "vit_mlp", lambda batch: batch)
    monkeypatch.setattr(fusing, "vision", lambda name, batch: batch)
    monkeypatch.setattr(fusing, "randomize_batch_norm", lambda network: network)
    monkeypatch.setattr(fusing, "linearised", lambda network, pick: network)
    monkeypatch.setattr(fusing, "moved", lambda network, device, dtype: (network, dtype))
    monkeypatch.setattr(fusing, "fuse_case", lambda name, network: (name, *network))
    cases = list(fusing.fuse_cases(CPU, [torch.float32], [3]))
    assert {case[1:] for case in cases} == {(3, torch.float32)}
    halves = [f"{name} half" for name in fusing.HALF]
    assert [case[0] for case in cases] == ["vit_b_16 MLP", "mobilenet_v2 all blocks", *halves, "block"]


# Networks and memory ----------------------------------------------------------------------------------------------------


def test_random_half_is_reproducible():
    names = [f"relu{index}" for index in range(9)]
    assert networks.random_half(names) == networks.random_half(names)
    assert len(set(networks.random_half(names))) == 4


def test_linearised_network_is_a_copy_without_picked_sites(residual):
    model, inputs = networks.linearised(residual, lambda names: [name for name in names if "relu" in name])
    assert [site.name for site in fe.find_sites(model, inputs)] == ["gelu"]
    assert len(fe.find_sites(*residual)) == 3


def test_peak_bytes_counts_simultaneous_tensors():
    def call():
        a = torch.ones(1000)
        del a
        b, c = torch.ones(2000), torch.ones(500)
        return b, c

    assert peak_bytes(call, CPU) == pytest.approx(4 * 2500, abs=200)


def test_peak_bytes_ignores_older_tensors():
    held = [torch.ones(10_000)]
    gc.collect()
    assert peak_bytes(lambda: held.append(torch.ones(100)) or held.pop(), CPU) < 4 * 1000
