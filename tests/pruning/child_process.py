"""`python -m tests.pruning.child_process`, which forks a child for each pruning run of test_kills.py.

Forking imports PyTorch, and compiles the counting kernels, only once.
"""

import json
import os
import pickle
import sys
import traceback
from pathlib import Path

import torch
from torch import nn

import fastentropy as fe
from tests._helpers.kill_points import die_at

DATA = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(64) % 3


def build():
    """Build a network whose weights take 6 MB, so that a kill can happen while they are written."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(16, 512), nn.BatchNorm1d(512), nn.ReLU()),
        nn.Sequential(nn.Linear(512, 1024), nn.BatchNorm1d(1024), nn.GELU(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.ReLU(inplace=True)),
        nn.Linear(1024, 3),
    )


def train(model):
    """Train with data order and dropout drawn from torch's default generator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in torch.randperm(len(DATA)).split(16):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(DATA[batch]), LABELS[batch]).backward()
        optimizer.step()


def evaluate(model):
    """Return a score that falls with the last activation, so that the run ends with a step that is not kept."""
    is_linear = not any(isinstance(module, nn.ReLU | nn.GELU) for module in model.modules())
    return -float(nn.functional.cross_entropy(model(DATA), LABELS)) - 10 * is_linear


def calibrate(model):
    model(DATA)


def prune(folder):
    """Run `prune`; return the history, and the bytes of the weights of the kept network."""
    functions = {"train": train, "evaluate": evaluate, "calibrate": calibrate}
    result = fe.prune(build(), **functions, example_inputs=(DATA[:2],), max_drop=5.0, checkpoint_dir=folder)
    weights = {name: value.numpy().tobytes() for name, value in result.model.state_dict().items()}
    return (result.removed, result.steps, result.kept_step), weights


def work(folder, outcome, fatal_moment):
    """Write the result, or the traceback, to the file `outcome`."""
    try:
        if fatal_moment is not None:
            die_at(fatal_moment)
        Path(outcome).write_bytes(pickle.dumps(prune(folder)))
    except BaseException:
        Path(outcome).write_bytes(pickle.dumps(traceback.format_exc()))
    finally:
        os._exit(0)


def serve():
    """Answer a line with the arguments of `work` by the child's process number, and the next line by its exit code.

    Until that line the number is not reused, even if the child has ended, so that the sender may kill it.
    """
    torch.set_num_threads(1)  # threads would not survive the fork
    model = build().eval()
    with torch.no_grad(), fe.collect(model):
        calibrate(model)
    for line in sys.stdin:
        if not (child := os.fork()):
            work(*json.loads(line))
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
