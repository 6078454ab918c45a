"""Time the networks at the end of a pruning run side by side."""

import functools

import torch
from torch import Tensor, nn

from fastentropy._utils.timing import measure_times
from fastentropy.fusion import FusedModel, fuse
from fastentropy.fusion.memory_format import with_channels_last_weights


@torch.no_grad()
def final_latencies(dense: nn.Module, pruned: nn.Module, fused: FusedModel, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Measure the time of one call of four networks in milliseconds. They are timed in alternation.

    The dense network and the pruned one are each run in both memory formats (contiguous and channels-last), and the lower time
    counts. The two fused networks are in the format that `fuse` chose.

    Args:
        dense: the trained network before any removal.
        pruned: the network after the removals.
        fused: the result of `fuse` for `pruned`.
        inputs: the inputs of one call.

    Returns:
        Milliseconds under the names "dense", "dense_fused", "pruned" and "fused".
    """
    models = {"dense": dense, "dense_fused": fuse(dense.eval(), inputs, progress=False), "pruned": pruned, "fused": fused}
    models |= {f"{name} in channels-last": with_channels_last_weights(models[name]) for name in ("dense", "pruned")}
    times = measure_times({name: functools.partial(model.eval(), *inputs) for name, model in models.items()}, rounds=31)
    best = {name: min(times[name], times.pop(f"{name} in channels-last")) for name in ("dense", "pruned")}
    return times | best
