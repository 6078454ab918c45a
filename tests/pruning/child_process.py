"""What test_kills.py runs in processes of its own: `python -m tests.pruning.child_process` forks a child for each pruning run.

So PyTorch is imported, and the counting kernels are compiled, only once.
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
    """A network whose weights are 6 MB, so that a kill can come while they are written."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(16, 512), nn.BatchNorm1d(512), nn.ReLU()),
        nn.Sequential(nn.Linear(512, 1024), nn.BatchNorm1d(1024), nn.GELU(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.ReLU(inplace=True)),
        nn.Linear(1024, 3),
    )


def train(model):
    """The order of the data and the dropout are drawn from torch's default generator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in torch.randperm(len(DATA)).split(16):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(DATA[batch]), LABELS[batch]).backward()
        optimizer.step()


def evaluate(model):
    """The score falls with the last activation, so that the run ends with a step that is not kept."""
    is_linear = not any(isinstance(module, nn.ReLU | nn.GELU) for module in model.modules())
    return -float(nn.functional.cross_entropy(model(DATA), LABELS)) - 10 * is_linear


def calibrate(model):
    model(DATA)


def prune(folder):
    """A whole run: its history, and the bytes of the weights of the network that it keeps."""
    functions = {"train": train, "evaluate": evaluate, "calibrate": calibrate}
    result = fe.prune(build(), **functions, example_inputs=(DATA[:2],), max_drop=5.0, checkpoint_dir=folder)
    weights = {name: value.numpy().tobytes() for name, value in result.model.state_dict().items()}
    return (result.removed, result.steps, result.kept_step), weights


def work(folder, outcome, fatal_moment):
    """Leave what came out, or how it failed, in the file `outcome`."""
    try:
        if fatal_moment is not None:
            die_at(fatal_moment)
        Path(outcome).write_bytes(pickle.dumps(prune(folder)))
    except BaseException:
        Path(outcome).write_bytes(pickle.dumps(traceback.format_exc()))
    finally:
        os._exit(0)


def serve():
    """A line with the arguments of `work` is answered by the child's number; the next line, by its exit code.

    Until that line the number stays the child's, even if it has ended: who sends the lines may kill it.
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
