"""Over which backend the counts of ranks are summed. test_distributed.py sums them in processes."""

import pytest
import torch
import torch.distributed as dist

import fastentropy as fe
from fastentropy.collector import reduction

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
BOTH, GLOO, NCCL = "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:gloo", "cuda:nccl"


@pytest.fixture
def group(monkeypatch):
    """Pretend that the process group has some backends, and the process an accelerator."""

    def pretend(config, accelerator="cuda"):
        monkeypatch.setattr(dist, "get_backend_config", lambda: config)
        found = accelerator and torch.device(accelerator)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)

    return pretend


@pytest.mark.parametrize(
    ("config", "names", "own", "expected"),
    [
        pytest.param(BOTH, ["cuda a", "cuda b"], FIRST, FIRST, id="a GPU for each rank"),
        pytest.param(BOTH, ["cuda a", "cuda b"], SECOND, SECOND, id="another GPU for each rank"),
        pytest.param(NCCL, ["cuda a", "cuda b"], SECOND, SECOND, id="a GPU for each rank, NCCL alone"),
        pytest.param("cpu:gloo,xpu:xccl", ["xpu a 0", "xpu a 1"], torch.device("xpu", 1), torch.device("xpu", 1), id="XPU"),
        pytest.param(BOTH, ["cuda a", "cuda a"], FIRST, CPU, id="one GPU for two ranks"),
        pytest.param(BOTH, ["cuda a", "cuda b", "cpu a None"], FIRST, CPU, id="a rank that counted on the CPU"),
        pytest.param(BOTH, ["cuda a", "cuda b", "cpu a None"], CPU, CPU, id="this rank counted on the CPU"),
        pytest.param(BOTH, ["cpu a None", "cpu a None"], CPU, CPU, id="all ranks counted on the CPU"),
        pytest.param(GLOO, ["cuda a", "cuda b"], FIRST, CPU, id="the backend of the CPU for both"),
        pytest.param("cpu:gloo", ["cuda a", "cuda b"], FIRST, CPU, id="a backend for the CPU alone"),
        pytest.param(NCCL, ["cuda a", "cpu a None"], CPU, torch.device("cuda"), id="nothing counted, NCCL alone"),
        pytest.param(NCCL, ["cuda a", "cpu a None"], SECOND, SECOND, id="another rank counted nothing, NCCL alone"),
    ],
)
def test_device_of_the_sum(config, names, own, expected, group):
    group(config, own.type if own.type != "cpu" else "cuda")
    assert reduction.reduction_device(names, own) == expected
    reduction.check_backend()


@pytest.mark.parametrize(
    ("devices", "current", "expected"),
    [([], 0, CPU), ([CPU], 0, CPU), ([CPU, SECOND], 0, SECOND), ([FIRST, SECOND], 1, SECOND), ([FIRST, SECOND], 5, FIRST)],
)
def test_device_that_counted(devices, current, expected, group, monkeypatch):
    group(BOTH)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current)
    assert reduction.counting_device(devices) == expected


def test_names_of_devices_differ():
    names = [reduction.device_name(torch.device("xpu", index)) for index in range(3)]
    assert len(set(names)) == 3
    assert all(name.startswith("xpu ") for name in names)
    assert reduction.device_name(CPU).startswith("cpu ")


@pytest.mark.parametrize(("config", "accelerator"), [("cuda:nccl", None), ("cuda:nccl", "xpu"), ("xpu:xccl", "cuda")])
def test_no_backend_for_the_devices(config, accelerator, group):
    group(config, accelerator)
    kinds = "cpu" if accelerator is None else f"cpu or {accelerator}"
    with pytest.raises(ValueError, match=f"^the process group has no backend for {kinds} tensors, only {config}; initialize"):
        reduction.check_backend()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that the group has a backend for it")
def test_sync_without_a_backend_says_so():
    collector = fe.collect(torch.nn.Sequential(torch.nn.ReLU()))
    collector.update(torch.ones(2, 3))
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"^the process group has no backend for cpu tensors, only cuda:gloo; init"):
            collector.sync()
    finally:
        dist.destroy_process_group()
    assert collector.sync()["0"].observations == 6


@pytest.mark.parametrize("config", ["gloo", "cpu:gloo"])
def test_sum_of_one_rank_on_its_cpu(config):
    tensors = [torch.arange(6).view(2, 3), torch.tensor(7), torch.empty(0, dtype=torch.int64)]
    dist.init_process_group(config, store=dist.HashStore(), rank=0, world_size=1)
    try:
        device = reduction.reduction_device([reduction.device_name(CPU)], CPU)
        summed = reduction.all_reduce(tensors, device)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(ours, given) for ours, given in zip(summed, tensors, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not dist.is_nccl_available(), reason="needs a GPU with NCCL")
@pytest.mark.parametrize("config", [BOTH, "nccl"])
def test_sum_of_a_gpu_runs_over_nccl(config, monkeypatch):
    used = []
    original = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x: used.append(x.device.type) or original(x))
    collector = fe.collect(torch.nn.Sequential(torch.nn.ReLU()).cuda(), average="batch")
    collector.update(torch.ones(2, 3, device="cuda"))
    dist.init_process_group(config, store=dist.HashStore(), rank=0, world_size=1)
    try:
        summed = collector.sync()
    finally:
        dist.destroy_process_group()
    assert used == ["cuda", "cuda"]
    assert torch.equal(summed["0"].counts, collector.compute()["0"].counts)
