"""Compiled models in training: with gradients, under activation checkpointing, and on ranks of DDP."""

import copy
import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastentropy as fe
from tests._helpers.compiling import Block, Blocks, NotingBackend, assert_same, batches, eagerly

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


def trained(model, run, inputs):
    """The gradients after each batch, and the statistics."""
    gradients = []
    with warnings.catch_warnings(), fe.collect(model) as collector:
        warnings.filterwarnings("ignore", ".*fe.isolate")
        for x in inputs:
            model.zero_grad()
            run(x).sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return gradients, collector.compute()


def assert_trained_alike(model, run, inputs):
    """Assert that a compiled model has the gradients that it has without a collector, and the statistics of eager mode."""
    expected = eagerly(model, *inputs)
    plain = []
    for x in inputs:
        model.zero_grad()
        run(x).sum().backward()
        plain.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    gradients, statistics = trained(model, run, inputs)
    assert_same(statistics, expected)
    for one, other in zip(gradients[1:], plain[1:], strict=True):
        assert all(map(torch.equal, one, other))


def test_training():
    model, inputs = Blocks(), batches(4, 4, 4, 6)
    assert_trained_alike(model, torch.compile(model, backend="aot_eager", fullgraph=True), inputs)


class Checkpointed(Blocks):
    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.end(self.head(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checkpoints_inside_of_the_graph(backend):
    model, backend, inputs = Checkpointed(), NotingBackend(backend), batches(4, 4, 4)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_trained_alike(model, compiled, inputs)
    assert backend.compilations() == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_around_compiled_layers(use_reentrant):
    class Around(Blocks):
        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            return self.end(self.head(x))

    model, inputs = Around(), [x.requires_grad_() for x in batches(4, 4, 4)]
    plain = copy.deepcopy(model)
    _, expected = trained(plain, plain, inputs)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    _, statistics = trained(model, model, inputs)
    assert_same(statistics, expected)


class CheckpointedLayers(Blocks):
    """Calls its layers in checkpoints once they are compiled."""

    def __init__(self, backend="aot_eager", use_reentrant=False):
        super().__init__()
        self.has_checkpoints, self.use_reentrant = False, use_reentrant
        self.backend = NotingBackend(backend)

    def compile_layers(self):
        self.has_checkpoints = True
        for layer in self.layers:
            layer.compile(backend=self.backend)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant) if self.has_checkpoints else layer(x)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_several_passes_before_a_backward_pass(use_reentrant):
    model, inputs = CheckpointedLayers(use_reentrant=use_reentrant), [x.requires_grad_() for x in batches(3, 3, 4, 4)]
    expected = eagerly(model, *inputs)
    model.compile_layers()
    with fe.collect(model) as collector:
        for one, other in (inputs[:2], inputs[2:]):
            (model(one).sum() + model(other).sum()).backward()
    assert_same(collector.compute(), expected)


def test_code_that_a_backward_pass_compiles_first():
    model, inputs = CheckpointedLayers(use_reentrant=True), [x.requires_grad_() for x in batches(3, 3, 3, 3)]
    expected = eagerly(model, *inputs)
    model.compile_layers()
    model(inputs[0]).sum().backward()
    plain = model.backend.compilations()
    with fe.collect(model) as collector:
        for x in inputs[:3]:
            model(x).sum().backward()
        assert model.backend.compilations() == plain
        model.has_checkpoints = False
        model(inputs[3]).sum().backward()
    assert_same(collector.compute(), expected)


def test_backward_pass_after_detaching():
    model, x = CheckpointedLayers(), batches(3)[0].requires_grad_()
    model.compile_layers()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    choosing = torch._dynamo.eval_frame._callback_from_stance
    with fe.collect(model):
        loss = model(x).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, expected)
    del loss
    gc.collect()
    assert torch._dynamo.eval_frame._callback_from_stance is choosing


class Masked(Checkpointed):
    def forward(self, x, attention_mask=None):
        return super().forward(x)


def test_checkpoints_with_padding_masks():
    model, inputs = Masked(), batches(4, 4, 6, 3)
    masks = [torch.arange(5)[None] < torch.randint(1, 5, (len(x), 1)) for x in inputs]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    collected = []
    for run in (copy.deepcopy(model), compiled):
        with warnings.catch_warnings(), fe.collect(run) as collector:
            warnings.filterwarnings("ignore", ".*fe.isolate")
            for x, mask in zip(inputs, masks, strict=True):
                run(x, attention_mask=mask).sum().backward()
        collected.append(collector.compute())
    assert_same(collected[1], collected[0])


def test_checkpoints_around_compiled_functions():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.run = torch.compile(lambda x: self.block(x) * 2, backend="aot_eager")

        def forward(self, x):
            return checkpoint(self.run, x, use_reentrant=False)

    model, inputs = Around(), [x.requires_grad_() for x in batches(4, 4, 4)]
    plain = Around()
    plain.load_state_dict(model.state_dict())
    plain.run = lambda x: plain.block(x) * 2
    _, expected = trained(plain, plain, inputs)
    _, statistics = trained(model, model, inputs)
    assert_same(statistics, expected)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("default")
def test_ddp_splits_the_graph(one_rank, monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 500)
    model, backend, inputs = Blocks(blocks=4), NotingBackend(), batches(4, 4, 4)
    expected = eagerly(model, *inputs)
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=2)
    compiled = torch.compile(ddp, backend=backend)
    for x in inputs:
        compiled(x).sum().backward()
    plain = backend.compilations()
    assert plain > 1
    with fe.collect(compiled) as collector:
        for x in inputs:
            compiled(x).sum().backward()
    assert backend.compilations() == plain
    statistics = collector.compute()
    assert [name.removeprefix("module.") for name in statistics] == list(expected)
    for name, site in statistics.items():
        assert torch.equal(site.counts, expected[name.removeprefix("module.")].counts)
