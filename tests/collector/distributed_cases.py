"""What each rank of test_distributed.py runs: cases, each a function that returns plain values, in one group of processes.

Models are float64: ranks may sum in another order than one process does, but no sign depends on the last bits.
"""

import contextlib
import itertools
import os
import traceback
from dataclasses import replace
from datetime import timedelta
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.profiler import profile
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import fastentropy as fe
from fastentropy.collector.distributed import sum_over_ranks
from fastentropy.sites.sharding import RankShare
from tests._helpers.networks import Reads

LAYERS = ("layers.0", "layers.1", "h.0", "h.1")
BATCHES = 7


def figures(statistics):
    """All integers of statistics, as plain values."""
    return {name: (site.activation, site.counts.tolist(), site.nan, site.batches) for name, site in statistics.items()}


def seeded(make, *arguments, **options):
    torch.manual_seed(3)
    return make(*arguments, **options).double().eval()


def llama():
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 12, "num_key_value_heads": 12}
    return seeded(LlamaModel, LlamaConfig(vocab_size=32, num_hidden_layers=2, pad_token_id=0, use_cache=False, **sizes))


def gpt2():
    special = {"bos_token_id": 1, "eos_token_id": 1, "use_cache": False}
    return seeded(GPT2Model, GPT2Config(vocab_size=32, n_positions=16, n_embd=24, n_layer=2, n_head=12, n_inner=36, **special))


def vit():
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 12}
    return seeded(ViTModel, ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))


MODELS = {"llama": llama, "gpt2": gpt2, "vit": vit}


def batches(name):
    """Batches of several sizes; those of tokens are padded, on the left or the right."""
    generator = torch.Generator().manual_seed(7)
    for size in range(1, BATCHES + 1):
        if name == "vit":
            yield {"pixel_values": torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)}
            continue
        tokens = torch.randint(1, 32, (size, 8), generator=generator)
        lengths = torch.randint(3, 9, (size, 1), generator=generator)
        mask = (torch.arange(8) < lengths).long()
        mask = mask.flip(1) if size % 2 else mask
        yield {"input_ids": tokens * mask, "attention_mask": mask}


class ParallelConv1D(ParallelStyle):
    """The columns or the rows of transformers' Conv1D, a linear layer whose weight is [inputs, outputs]."""

    def __init__(self, columns):
        self._columns = columns

    def _apply(self, module, device_mesh):
        def divide(name, module, mesh):
            placements = {"weight": Shard(1), "bias": Shard(0)} if self._columns else {"weight": Shard(0), "bias": Replicate()}
            for key, placement in placements.items():
                parameter = distribute_tensor(getattr(module, key), mesh, [placement])
                module.register_parameter(key, nn.Parameter(parameter))

        def take(module, inputs, mesh):
            return DTensor.from_local(inputs[0], mesh, [Replicate() if self._columns else Shard(-1)])

        def give(module, output, mesh):
            return (output if self._columns else output.redistribute(placements=[Replicate()])).to_local()

        return distribute_module(module, device_mesh, divide, take, give)


def tensor_parallel(model, mesh):
    """The feed-forward layers, and of those attentions that allow it the heads, are divided among ranks."""
    columns, rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"), ("o_proj", "down_proj", "fc2")
    plan = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in columns + rows:
            plan[name] = ColwiseParallel() if last in columns else RowwiseParallel()
        elif type(module).__name__ == "Conv1D" and ".mlp." in name:
            plan[name] = ParallelConv1D(last == "c_fc")
    return parallelize_module(model, mesh, plan)


def fully_sharded(model, mesh):
    for name in LAYERS:
        if name in dict(model.named_modules()):
            fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def counted(model, name, rank=0, ranks=1, mode=torch.no_grad, **options):
    """A collector that counted every so many batches; all ranks run the model equally often, as FSDP needs it."""
    mine = list(batches(name))
    with mode(), fe.collect(model, **options) as collector:
        for start in range(0, len(mine), ranks):
            if start + rank < len(mine):
                model(**mine[start + rank])
            else:
                with collector.paused():
                    model(**mine[0])
    return collector


def in_one_process(name, **options):
    return counted(MODELS[name](), name, **options)


def world_mesh(*names):
    shape = (dist.get_world_size(),) if len(names) == 1 else (2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def data_parallel(name):
    model = nn.parallel.DistributedDataParallel(MODELS[name]())
    statistics = counted(model, name, dist.get_rank(), dist.get_world_size()).sync()
    return {path.removeprefix("module."): site for path, site in figures(statistics).items()}


def fully_sharded_data_parallel(name):
    model = fully_sharded(MODELS[name](), world_mesh("dp"))
    return figures(counted(model, name, dist.get_rank(), dist.get_world_size()).sync())


def tensor_parallel_alone(name):
    return figures(counted(tensor_parallel(MODELS[name](), world_mesh("tp")), name).sync())


def both_parallel(name):
    mesh = world_mesh("dp", "tp")
    model = fully_sharded(tensor_parallel(MODELS[name](), mesh["tp"]), mesh["dp"])
    return figures(counted(model, name, mesh["dp"].get_local_rank(), 2).sync())


def layers(widths=(4, 10), output=None, activation=None):
    """A linear layer and an activation, and another layer where there is an output."""
    first = [nn.Linear(*widths), activation or nn.ReLU()]
    return seeded(nn.Sequential, *first, *([nn.Linear(widths[1], output)] if output else []))


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(model, *arguments, grad=False, **options):
    """A collector that counted two passes: the one that discovers the sites, and another."""
    with torch.set_grad_enabled(grad), fe.collect(model, **options) as collector:
        for _ in range(2):
            model(*arguments)
    return collector


def plain(model, x, passes=2):
    """The counts of a model of two layers without any of our code."""
    y = model[0](x).flatten(0, -2)
    return (passes * torch.stack([(y < 0).sum(0), (y == 0).sum(0), (y > 0).sum(0)], dim=1)).tolist()


def uneven(neurons, use_local_output, grad):
    """The counts of neurons that cannot be divided evenly, and how many of them this rank has."""
    model, x = layers((4, neurons)), inputs(5, 3, 4)
    expected = plain(model, x)
    parallelize_module(model, world_mesh("tp"), {"0": ColwiseParallel(use_local_output=use_local_output)})
    (site,) = fe.find_sites(model, (x,))
    return run(model, x, grad=grad).sync()["1"].counts.tolist() == expected, site.neurons


def in_mode(parallel, mode):
    """The counts where gradients are recorded, and in inference mode, in which other operators run."""
    model, ranks = llama(), dist.get_world_size() if parallel is fully_sharded else 1
    parallel(model, world_mesh("dp" if parallel is fully_sharded else "tp"))
    rank = dist.get_rank() if parallel is fully_sharded else 0
    return figures(counted(model, "llama", rank, ranks, mode).sync()) == figures(in_one_process("llama").compute())


def functional(use_local_output):
    """Activations that are called as functions."""
    model, x = Reads(lambda m, x: nn.functional.relu(m.fc(x)), fc=seeded(nn.Linear, 4, 6)), inputs(5, 4)
    expected = figures(run(model, x).compute())
    parallelize_module(model, world_mesh("tp"), {"fc": ColwiseParallel(use_local_output=use_local_output)})
    return figures(run(model, x).sync()) == expected


def nan_is_counted_once():
    """NaN in neurons that ranks divide and in such that all have, and how many there are in one process."""
    model = Reads(
        lambda m, x: m.b(m.head(m.down(m.a(m.up(x))))),
        **{"up": nn.Linear(4, 6), "a": nn.ReLU(), "down": nn.Linear(6, 4), "head": nn.Linear(4, 3), "b": nn.GELU()},
    ).double()
    x = inputs(5, 4)
    x[2, 1] = torch.nan
    parallelize_module(model, world_mesh("tp"), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return {name: site.nan for name, site in run(model, x).sync().items()}


def replicated(head):
    """An activation that all ranks have all of: behind a layer that is not parallel, or a DTensor, or out of one."""
    model, x = layers((4, 6), 5), inputs(5, 4)
    model.append(nn.GELU()).append(nn.Linear(5, 3).double())
    expected = figures(run(model, x, average="batch").compute())
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if head == "plain layer":
        plan = {"4": ColwiseParallel()}
    if head == "DTensor":
        plan["2"] = RowwiseParallel(use_local_output=False)
        plan["4"] = ColwiseParallel()
    parallelize_module(model, world_mesh("tp"), plan)
    return figures(run(model, x, average="batch").sync()) == expected


def weights_that_are_looked_at():
    """Data-parallel ranks of FSDP while a hook reads the weights, which are DTensors between their uses."""
    ranks = dist.get_world_size()
    data = inputs(ranks, 5, 4)
    expected = plain(layers((4, 6), 3), data, passes=2)
    model = fully_sharded_layers(layers((4, 6), 3), world_mesh("dp"))
    model[1].register_forward_pre_hook(lambda module, args: [weight.detach().norm() for weight in model.parameters()] and None)
    return run(model, data[dist.get_rank()]).sync()["1"].counts.tolist() == expected


def fully_sharded_layers(model, mesh):
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model


def no_copies():
    """Ranks with data of their own in a model that uses a DTensor for something else."""
    mesh = world_mesh("tp")

    def forward(m, x):
        DTensor.from_local(x, mesh, [Replicate()]).sum()
        return m.relu(m.fc(x))

    model = Reads(forward, fc=seeded(nn.Linear, 4, 6), relu=nn.ReLU())
    return message(model, inputs(dist.get_world_size(), 5, 4)[dist.get_rank()])


class Tokens(nn.Module):
    """A norm, an activation, a layer and another activation, with a padding mask."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu, self.fc, self.gelu = nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.GELU()

    def forward(self, x, attention_mask=None):
        return self.gelu(self.fc(self.relu(self.norm(x))))


def sequence_parallel(use_local_output, padded):
    """Activations of tokens that ranks divide, in sequences of several lengths; a mask is one of all tokens."""
    # Only DTensors can be divided unevenly, and PyTorch 2.11 runs no linear layer on parts of different sizes.
    lengths = (8, 4) if use_local_output or torch.__version__ < (2, 12) else (7, 5)
    masks = [(torch.arange(length) >= torch.tensor([[0], [3]])).long() if padded else None for length in lengths]
    model, mesh = seeded(Tokens), world_mesh("tp")

    def passes(divided):
        with fe.collect(model) as collector:
            for length, mask in zip(lengths, masks, strict=True):
                x = inputs(2, length, 6)
                model(distribute_tensor(x, mesh, [Shard(1)]) if divided else x, mask)
        return collector

    expected = figures(passes(divided=False).compute())
    plan = {"norm": SequenceParallel(use_local_output=use_local_output), "fc": ColwiseParallel(input_layouts=Shard(1))}
    parallelize_module(model, mesh, plan)
    return figures(passes(divided=True).sync()) == expected


def batches_of_divided_tokens():
    """How many batches are told apart where no rank has a whole one, and where ranks have other neurons of the same."""
    model, x, mesh = seeded(Tokens), inputs(2, 4, 6), world_mesh("tp")
    parallelize_module(model, mesh, {"norm": SequenceParallel(), "fc": ColwiseParallel(input_layouts=Shard(1))})
    statistics = run(model, distribute_tensor(x, mesh, [Shard(1)]), average="batch").sync()
    return {name: (site.batch_entropies is None, site.batches) for name, site in statistics.items()}


def entropies_of_batches(divided):
    """The entropies of batches are those of one process, on ranks that divide the data, or the neurons."""
    model, x = layers((4, 6)), inputs(4, 5, 4)
    expected = run_each(model, x).compute()["1"]
    if divided == "neurons":
        parallelize_module(model, world_mesh("tp"), {"0": ColwiseParallel()})
    else:
        x = x[dist.get_rank() :: dist.get_world_size()]
    site = run_each(model, x).sync()["1"]
    return torch.allclose(site.batch_entropies, expected.batch_entropies, rtol=1e-12, atol=0), site.batches == expected.batches


def batches_with_gaps(divided):
    """Batches in which some or all neurons have no value: entropies and numbers of batches are those of one process."""
    model, x = layers((4, 6)), inputs(5, 7, 4)
    x[1] = torch.nan  # no neuron has a value
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[0, 0] = 1
        model[0].bias[1] = torch.nan  # this neuron never has one
    expected = run_each(model, x).compute()["1"]
    if divided == "neurons":
        parallelize_module(model, world_mesh("tp"), {"0": ColwiseParallel()})
    else:
        x = x[dist.get_rank() :: dist.get_world_size()]
    site = run_each(model, x).sync()["1"]
    numbers = [(each.batches, each.neuron_batches.tolist(), each.nan) for each in (site, expected)]
    same = torch.allclose(site.entropy(average="batch"), expected.entropy(average="batch"), rtol=1e-12, atol=0)
    return same, numbers[0] == numbers[1], numbers[0][:2]


def notes_of_ranks():
    """Each rank has a note of its own and one in common, and rank 1 infers an axis."""
    model, x = layers((4, 6)), inputs(5, 4)
    collector, rank = run(model, x), dist.get_rank()
    statistics = collector.compute()
    sites = {name: replace(site, axis_is_inferred=rank == 1) for name, site in statistics.items()}
    shares = {name: RankShare(0, site.neurons) for name, site in sites.items()}
    summed = sum_over_ranks(fe.Statistics(sites, ["all", f"rank {rank}"]), shares, {"1": "relu"})
    return summed.notes, summed["1"].axis_is_inferred, summed["1"].channel_axis


def run_each(model, x):
    with fe.collect(model, average="batch") as collector:
        for batch in x:
            model(batch)
    return collector


def pipeline():
    """Each rank has some layers of one model, and calls them by the names that they have there."""
    whole = seeded(nn.Sequential, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3), nn.SiLU())
    x = inputs(5, 4)
    expected = figures(run(whole, x).compute())
    first, last = torch.tensor_split(torch.arange(len(whole) // 2), dist.get_world_size())[dist.get_rank()][[0, -1]] * 2
    stage = Reads(lambda m, x: nn.Sequential(*m.children())(x), **dict(list(whole.named_children())[first : last + 2]))
    received = whole[:first](x)
    synced = figures(run(stage, received).sync())
    return synced == expected, list(synced) == list(expected)


def message(model, *arguments):
    """What sync says about the models that the ranks have run."""
    try:
        return str(run(model, *arguments).sync())
    except ValueError as error:
        return str(error)


def other_modules():
    model = seeded(nn.Sequential, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.GELU())
    return message(model[:2] if dist.get_rank() else model, inputs(5, 4))


def other_neurons():
    return message(layers((4, 5 + dist.get_rank())), inputs(5, 4))


def other_activation():
    return message(layers(activation=nn.GELU() if dist.get_rank() else nn.ReLU()), inputs(5, 4))


def not_followed():
    """Halves of a shard are no shards of the halves."""
    model = Reads(lambda m, x: m.relu(m.fc(x).chunk(2, dim=-1)[0]), fc=nn.Linear(4, 8).double(), relu=nn.ReLU())
    parallelize_module(model, world_mesh("tp"), {"fc": ColwiseParallel()})
    return message(model, inputs(5, 4))


def partial_sums():
    """A DTensor that ranks have yet to add up is no input whose signs can be counted."""
    model = nn.Sequential(nn.ReLU())
    x = DTensor.from_local(inputs(5, 4), world_mesh("tp"), [Partial()])
    try:
        run(model, x)
    except RuntimeError as error:
        return str(error)


def divided_otherwise():
    """A DTensor that all ranks have, and in the next pass one whose rows they divide."""
    model, mesh = nn.Sequential(nn.ReLU()), world_mesh("tp")
    with fe.collect(model):
        model(distribute_tensor(inputs(6, 4), mesh, [Replicate()]))
        try:
            model(distribute_tensor(inputs(6, 4), mesh, [Shard(0)]))
        except RuntimeError as error:
            return str(error)


def reshapes(use_local_output):
    """Neurons that ranks divide and a reshape merges with positions, or makes rows of: heads are positions of their entries."""
    mesh, results = world_mesh("tp"), []
    for width, between in [(12, lambda y: y.unflatten(-1, (-1, 3))), (4, lambda y: y.transpose(1, 2).flatten(1))]:
        fc = seeded(nn.Linear, 4, width)
        model = Reads(lambda m, x, between=between: m.relu(between(m.fc(x))), fc=fc, relu=nn.ReLU())
        expected = figures(run(model, inputs(5, 3, 4)).compute())
        parallelize_module(model, mesh, {"fc": ColwiseParallel(use_local_output=use_local_output)})
        results.append(figures(run(model, inputs(5, 3, 4)).sync()) == expected)
    return results


def local_weights():
    """A matrix product of the parts that ranks have of weights, and their sum, without DTensors, as transformers does it."""

    def forward(m, x):
        hidden = m.relu(nn.functional.linear(x, m.up.weight.to_local(), m.up.bias.to_local()))
        output = nn.functional.linear(hidden, m.down.weight.to_local())
        dist.all_reduce(output)
        return m.gelu(output)

    up, down, x, mesh = seeded(nn.Linear, 4, 6), seeded(nn.Linear, 6, 5, bias=False), inputs(5, 3, 4), world_mesh("tp")
    names = {"relu": up, "gelu": nn.Sequential(up, nn.ReLU(), down)}
    expected = {name: plain([layer], x) for name, layer in names.items()}
    for layer, name, placement in [(up, "weight", Shard(0)), (up, "bias", Shard(0)), (down, "weight", Shard(1))]:
        layer.register_parameter(name, nn.Parameter(distribute_tensor(getattr(layer, name), mesh, [placement])))
    statistics = run(Reads(forward, up=up, relu=nn.ReLU(), down=down, gelu=nn.GELU()), x).sync()
    return {name: site.counts.tolist() for name, site in statistics.items()} == expected


def transformers_plan():
    """A checkpoint that transformers loads with its own plan."""
    if dist.get_rank() == 0:
        llama().save_pretrained("llama")
    dist.barrier()
    model = LlamaModel.from_pretrained("llama", tp_plan="auto", dtype=torch.float64).eval()
    return figures(counted(model, "llama").sync()) == figures(in_one_process("llama").compute())


def a_rank_without_batches():
    model, x = layers(), inputs(5, 4)
    with fe.collect(model) as collector:
        if dist.get_rank() == 1:
            model(x)
    return collector.sync()["1"].counts.tolist() == plain(model, x, passes=1)


def an_expert_without_tokens():
    """Each rank has its batch go to another expert: the sites of all ranks, in the order of ranks."""
    experts = {"first": layers((4, 6)), "second": layers((4, 6))}
    model = Reads(lambda m, x, name: m.get_submodule(name)(x), **experts)
    statistics = run(model, inputs(5, 4), ("first", "second")[dist.get_rank()]).sync()
    return {name: site.counts.tolist() == plain(experts[name[:-2]], inputs(5, 4)) for name, site in statistics.items()}


def in_the_middle():
    """A sync between two batches leaves the counts as they are: before, after and at the end."""
    model, x = layers(), inputs(5, 4)
    with fe.collect(model) as collector:
        model(x)
        before = figures(collector.compute())
        collector.sync()
        after = figures(collector.compute())
        model(x)
    ranks = dist.get_world_size()
    return before == after, collector.sync()["1"].counts.tolist() == plain(model, x, passes=2 * ranks)


def restored():
    """Each rank goes on from its own state, with and without another pass; then one from a state of another rank."""
    model, x, mesh = layers(), inputs(5, 4), world_mesh("tp")
    expected = plain(model, x)
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    state = run(model, x).state_dict()
    collector = fe.collect(model)
    collector.load_state_dict(state)
    before = collector.sync()["1"].counts.tolist() == expected
    collector.update(x)
    collector.update(x)
    after = collector.sync()["1"].counts.tolist() == [[2 * count for count in counts] for counts in expected]
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    collector.load_state_dict(states[0])
    try:
        collector.sync()
    except ValueError as error:
        return before, after, str(error)


def collectives(parallel):
    """The collectives that two passes issue while a collector is attached, and without one."""
    batch = next(batches("llama"))

    def issued(attach):
        model = llama()
        model = tensor_parallel(model, world_mesh("tp")) if parallel else nn.parallel.DistributedDataParallel(model)
        with torch.no_grad(), profile() as profiled, fe.collect(model) if attach else contextlib.nullcontext():
            for _ in range(2):
                model(**batch)
        return sorted(event.name for event in profiled.events() if event.name.startswith("gloo:"))

    return issued(attach=True), issued(attach=False)


def reductions(average):
    """The element types of the all-reduces of one sync."""
    collector = counted(tensor_parallel(llama(), world_mesh("tp")), "llama", average=average)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        collector.sync()
    return [str(call.args[0].dtype) for call in all_reduce.call_args_list]


def cases(world_size):
    """The cases of a world size: by name, functions of no arguments."""
    kinds = {"ddp": data_parallel, "fsdp": fully_sharded_data_parallel, "tp": tensor_parallel_alone}
    if world_size == 4:
        kinds["mesh"] = both_parallel
    found = {f"{kind} {name}": partial(case, name) for kind, case in kinds.items() for name in MODELS}
    if world_size > 2:
        options = itertools.product((10, 2), (True, False), (True, False))
        found |= {f"uneven {' '.join(map(str, option))}": partial(uneven, *option) for option in options}
    if world_size == 3:
        found["pipeline"] = pipeline
    if world_size == 2:
        found |= {case.__name__: case for case in OF_TWO_RANKS}
        found |= {f"{case.__name__} {value}": partial(case, value) for case, value in WITH_A_VALUE}
        for local, padded in itertools.product((True, False), (True, False)):
            found[f"sequence_parallel {local} {padded}"] = partial(sequence_parallel, local, padded)
        for parallel, mode in itertools.product((fully_sharded, tensor_parallel), (torch.enable_grad, torch.inference_mode)):
            found[f"in_mode {parallel.__name__} {mode.__name__}"] = partial(in_mode, parallel, mode)
    return found


OF_TWO_RANKS = (
    nan_is_counted_once, batches_of_divided_tokens, pipeline, other_modules, other_neurons, other_activation, not_followed,
    partial_sums, divided_otherwise, local_weights, transformers_plan, a_rank_without_batches, an_expert_without_tokens,
    in_the_middle, restored, weights_that_are_looked_at, no_copies, notes_of_ranks,
)  # fmt: skip
WITH_A_VALUE = (
    *((replicated, head) for head in ("to_local", "plain layer", "DTensor")),
    *((entropies_of_batches, divided) for divided in ("data", "neurons")),
    *((batches_with_gaps, divided) for divided in ("data", "neurons")),
    *((functional, use_local_output) for use_local_output in (True, False)),
    *((reshapes, use_local_output) for use_local_output in (True, False)),
    *((collectives, parallel) for parallel in (True, False)),
    *((reductions, average) for average in ("dataset", "batch")),
)


def work(rank, world_size, folder):
    """Run all cases in one rank, and write what they returned or raised."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}  # as transformers asks for
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    outcomes = {}
    for name, case in cases(world_size).items():
        try:
            outcomes[name] = case()
        except Exception:
            outcomes[name] = traceback.format_exc()
    torch.save(outcomes, folder / f"{rank}.pt")
    dist.destroy_process_group()
