"""What each rank of test_ranks.py runs."""

import torch
import torch.distributed as dist

import fastentropy as fe
from tests.monitoring.loops import FEATURES, LABELS, Network

RANKS = 2


def work(rank, folder):
    """Train on batches of this rank with DistributedDataParallel, and save what the first activation was given."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    model = Network()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.001)
    monitor = fe.EntropyMonitor(model, every=2, writers=[fe.json_lines_writer(folder / f"lines-{rank}")])
    for number in range(4):
        batch = torch.randperm(24, generator=torch.Generator().manual_seed(RANKS * number + rank))[: 5 + rank]
        with monitor.step():
            wrapped(FEATURES[batch], LABELS[batch])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    latest = {name: [site.observations, *site.counts.sum(0).tolist()] for name, site in monitor.latest.items()}
    torch.save({"latest": latest, "inputs": model.inputs[1]}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def states(x):
    """Return how many values are off, zero and on."""
    return [int(state.sum()) for state in (x < 0, x == 0, x > 0)]
