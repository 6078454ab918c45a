"""Take the activations of a traced graph apart that treat each neuron by itself."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch.fx import GraphModule, Node

from fastentropy._compat import size_of
from fastentropy.fusion.chains.aten import read_node
from fastentropy.fusion.chains.nodes import module_path, shape_of
from fastentropy.fusion.neurons.cutting import cut_constant_channels, note_values
from fastentropy.fusion.neurons.masks import lower_masks, mask_of, masks_of


class TakenApart(NamedTuple):
    """A graph with as little as its neurons need.

    Attributes:
        network: the graph.
        neurons: for the path of each activation that treated each neuron by itself, how many neurons were `active`, `linear`
            and `constant`, and how many of all were `cut` out.
        multiplications: of the convolutions and linear layers at the sizes of the trace, `before` and `after`.
    """

    network: GraphModule
    neurons: dict[str, dict[str, int]]
    multiplications: dict[str, int]


def take_apart(traced: GraphModule) -> TakenApart | None:
    """Return a graph that computes the same with as little as its constant and linear neurons need.

    The channels of constant neurons are cut out of the operators before and behind. Where all neurons left are active, or all
    are linear, the activation is applied to all or to none. A ReLU or ReLU6 of some of them becomes bounds for each channel.

    Args:
        traced: the graph, as `prepared_module` returns it.

    Returns:
        The graph. None if no activation treats each neuron by itself.
    """
    if all(mask_of(node, traced) is None for node in traced.graph.nodes):
        return None
    network, kept = cut_constant_channels(traced)
    note_values(network)
    lower_masks(network)
    note_values(network)
    network.recompile()
    before, after = map(_multiplications, (traced, network))
    return TakenApart(network, _neurons(traced, kept), {"before": before, "after": after})


def _neurons(traced: GraphModule, kept: Mapping[Node, int]) -> dict[str, dict[str, int]]:
    """Return the number of neurons in each state, by the path of their activation; further calls of it are numbered.

    Args:
        traced: the graph.
        kept: how many channels are left of each value that has fewer.
    """
    neurons: dict[str, dict[str, int]] = {}
    calls: Counter[str] = Counter()
    for node in traced.graph.nodes:
        if (masks := masks_of(node, traced)) is None:
            continue
        active, linear = masks
        path, count = module_path(node), active.numel()
        states = {"active": int(active.sum()), "linear": int((linear & ~active).sum())}
        name = f"{path}:{calls[path]}" if calls[path] else path
        calls[path] += 1
        neurons[name] = {**states, "constant": count - sum(states.values()), "cut": count - kept.get(node, count)}
    return neurons


def _multiplications(module: GraphModule) -> int:
    """Return the number of multiplications of the convolutions and linear layers of a graph."""
    count = 0
    for node in module.graph.nodes:
        for affine in read_node(node, module)[:1]:
            if affine.name and affine.build is not None and affine.axes is not None:
                shape = [size_of(size) for size in shape_of(affine.operand) or ()]
                count += affine.build(affine.axes).multiplications(shape)
    return count
