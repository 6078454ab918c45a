"""Backends of torch.compile that note what they compile, models to be compiled, and what is collected on them in eager mode."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastentropy as fe


class NotingBackend:
    """A backend that notes the graphs that it is given, and lets a backend of PyTorch compile them.

    Attributes:
        graphs: the graphs, in order.
    """

    def __init__(self, name: str = "aot_eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._name = name

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self._name)(graph, inputs)

    def compilations(self) -> int:
        """Return how many graphs were compiled since the last call."""
        number = len(self.graphs)
        self.graphs.clear()
        return number


class Block(nn.Module):
    """A block with an activation that is a module, and one that is a function."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 16), nn.Linear(16, 8), activation()

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.b(self.act(self.a(x))))


class Blocks(nn.Module):
    """Blocks that are alike, and an activation that is called twice."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.GELU, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(activation) for _ in range(blocks))
        self.head, self.back, self.end = nn.Linear(8, 4), nn.Linear(4, 5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.end(self.back(self.end(self.head(x))))


def eagerly(model: nn.Module, *inputs: Tensor, state: Mapping[str, Any] | None = None, **options: Any) -> fe.Statistics:
    """Return the statistics that are collected on a copy of a model that is not compiled, with the weights in `state`."""
    plain = copy.deepcopy(model)
    if state is not None:
        plain.load_state_dict(state)
    with warnings.catch_warnings(), torch.no_grad(), fe.collect(plain, **options) as collector:
        warnings.filterwarnings("ignore", ".*fe.isolate")
        for x in inputs:
            plain(x)
    return collector.compute()


def assert_same(statistics: fe.Statistics, expected: fe.Statistics) -> None:
    """Assert that two statistics have the same sites in the same order, and the same counts."""
    assert list(statistics) == list(expected)
    for name, site in expected.items():
        assert torch.equal(statistics[name].counts, site.counts), name
        assert (statistics[name].activation, statistics[name].nan) == (site.activation, site.nan), name


def batches(*sizes: int) -> list[Tensor]:
    """Return random inputs of `Blocks` with these batch sizes."""
    return [torch.randn(size, 5, 8) for size in sizes]
