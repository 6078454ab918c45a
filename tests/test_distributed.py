"""Sums over ranks, in real processes."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastentropy as fe


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.GELU())


def batches():
    return torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(1))


def work(rank, world_size, port, folder, different):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    model = make_model()
    if different and rank:
        model = model[:2]
    with fe.collect(model, average="batch") as collector:
        for batch in batches()[rank::world_size]:
            model(batch)
    own = collector.compute()
    try:
        collector.sync().save(folder / f"{rank}.safetensors")
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    assert all(torch.equal(own[name].counts, site.counts) for name, site in collector.compute().items())
    dist.destroy_process_group()


def run(folder, world_size, different=False):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(work, (world_size, port, folder, different), nprocs=world_size)


def test_ranks_sum_to_one_process(tmp_path):
    run(tmp_path, 2)
    model = make_model()
    with fe.collect(model, average="batch") as collector:
        for batch in batches():
            model(batch)
    expected = collector.sync()
    for rank in range(2):
        statistics = fe.Statistics.load(tmp_path / f"{rank}.safetensors")
        assert list(statistics) == list(expected)
        for name, site in statistics.items():
            assert torch.equal(site.counts, expected[name].counts)
            assert site.batches == 9
            torch.testing.assert_close(site.batch_entropies, expected[name].batch_entropies)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
def test_ranks_with_different_sites_are_told(tmp_path):
    run(tmp_path, 2, different=True)
    assert all("counted different sites (3); run the same model" in (tmp_path / f"{rank}.txt").read_text() for rank in range(2))
