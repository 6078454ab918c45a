"""A small network with a plain training loop, and what a monitor of it has to write."""

import json
import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = (1, 3)
FEATURES = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


class BrokenError(Exception):
    """What a training raises that breaks."""


class Network(nn.Module):
    """A classifier for the trainers of all libraries. Of its first activation one neuron is dead and one always on.

    Attributes:
        inputs: for each activation, its inputs in training, a tensor for each pass.
        breaks_at: the number, from 1, of the backward pass that raises, or 0.
    """

    def __init__(self, breaks_at=0):
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, 3)]
        self.layers, self.breaks_at = nn.Sequential(*layers), breaks_at
        with torch.no_grad():
            self.layers[0].bias[:2] = torch.tensor([-100.0, 100.0])
            self.layers[2].weight *= 10
            self.layers[2].weight[:, 1] = 0  # else the signs of the next layer would be those of its weights
        self.inputs = {layer: [] for layer in ACTIVATIONS}
        for layer in ACTIVATIONS:
            self.layers[layer].register_forward_pre_hook(lambda module, args, layer=layer: self._keep(layer, args[0]))

    def forward(self, features, labels=None):
        logits = self.layers(features)
        if self.training:
            logits.register_hook(self._break)
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def _keep(self, layer, x):
        if self.training:
            self.inputs[layer].append(x.detach())

    def _break(self, gradient):
        self.breaks_at -= 1
        if self.breaks_at == 0:
            raise BrokenError


def train(model, monitor=None, steps=7, passes=1):
    """Train a network with a plain loop of steps of several passes, and run it on other data after each step."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(steps):
        with monitor.step() if monitor else torch.enable_grad():
            for batch in torch.randperm(24).split(4)[:passes]:
                model(FEATURES[batch], LABELS[batch])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()(FEATURES)
        model.train()


def expected(model, number, passes=1):
    """Return what has to be written of a step: the figures of the passes that it had, by an oracle."""
    figures = {"entropy": [], "dead": [], "always_on": []}
    for inputs in model.inputs.values():
        x = torch.cat(inputs[number * passes : (number + 1) * passes])
        on, off = (x > 0).sum(0), (x < 0).sum(0)
        p = on.double() / (on + off)
        bits = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
        figures["entropy"].append(bits)
        figures["dead"].append((on == 0).double())
        figures["always_on"].append((on == len(x)).double())
    return {
        f"{figure}/layers.{layer}": float(values.mean())
        for figure, neurons in figures.items()
        for layer, values in zip(ACTIVATIONS, neurons, strict=True)
    }


def read_lines(path):
    """Return the figures in a file of JSON lines, by step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.pop("step"): line for line in lines}


def read_events(folder):
    """Return the scalars in TensorBoard's event files of a folder, by step. No step has a tag twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator, steps = EventAccumulator(str(folder)), {}
    accumulator.Reload()
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            assert steps.setdefault(event.step, {}).setdefault(tag, event.value) == event.value
    return steps
