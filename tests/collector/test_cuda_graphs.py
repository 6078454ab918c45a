"""Counting on GPUs, where a CUDA graph repeats a pass."""

import pytest
import torch
from torch import nn

from fastentropy import collect
from tests._helpers.networks import make_part
from tests._helpers.statistics import counted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_cuda_graph_counts_at_each_replay():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.SiLU()).cuda().eval()
    x = torch.randn(32, 64, device="cuda")
    with torch.inference_mode(), collect(model) as collector:
        with collector.paused():
            model(x)
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
        collector.reset()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    assert counted(collector) == {"1": 5 * 32 * 128, "3": 5 * 32 * 64}
    assert all(site.nan == 0 for site in collector.compute().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_cuda_graph_leaves_padding_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down, self.end = nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64), nn.GELU()

        def forward(self, x, attention_mask=None):
            return self.end(self.down(self.act(self.up(x))))

    model = Tokens().cuda().eval()
    x, mask = torch.randn(4, 10, 64, device="cuda"), torch.ones(4, 10, dtype=torch.int64, device="cuda")
    with torch.inference_mode(), collect(model) as collector:
        for _ in range(2):
            model(x, attention_mask=mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x, attention_mask=mask)
        collector.reset()
        mask[:, 7:] = 0
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    assert counted(collector) == {"act": 3 * 4 * 7 * 96, "end": 3 * 4 * 7 * 64}
    assert all(site.nan == 0 for site in collector.compute().values())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_of_one_model_are_added_up():
    model = nn.DataParallel(make_part().cuda())
    with collect(model) as collector:
        model(torch.randn(8, 3, device="cuda"))
    assert counted(collector) == {"module.1": 32, "module.2.1": 40}
