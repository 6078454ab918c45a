"""Take the activations of a traced graph apart that treat each neuron by itself."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from torch.fx import GraphModule, Node

from fastentropy._compat import size_of
from fastentropy.fusion.chains.aten import read_node
from fastentropy.fusion.chains.nodes import module_path, shape_of
from fastentropy.fusion.neurons.cutting import SITE, cut_constant_channels, note_values
from fastentropy.fusion.neurons.masks import lower_masks, mask_of, masks_of

#: Gives linear neurons of a graph paths of their own. Returns the graph, and the number of such neurons of each activation.
Split: TypeAlias = Callable[[GraphModule], tuple[GraphModule, Mapping[str, int]]]


class TakenApart(NamedTuple):
    """A graph with as little as its neurons need.

    Attributes:
        network: the graph.
        neurons: for the path of each activation that treated each neuron by itself, how many neurons were `active`, `linear`
            and `constant`, how many of all were `cut` out, and how many linear ones were `split` off, on a path of their own.
        multiplications: of the convolutions and linear layers at the sizes of the trace, `before` and `after`.
    """

    network: GraphModule
    neurons: dict[str, dict[str, int]]
    multiplications: dict[str, int]


def take_apart(traced: GraphModule, split: Split = lambda network: (network, {})) -> TakenApart | None:
    """Return a graph that computes the same with as little as its constant and linear neurons need.

    The channels of constant neurons are cut out of the operators before and behind. Where all neurons left are active, or all
    are linear, the activation is applied to all or to none. Linear neurons get a path of their own where `split` wants it. Any
    other ReLU or ReLU6 with masks becomes bounds for each channel.

    Args:
        traced: the graph, as `prepared_module` returns it.
        split: gives linear neurons paths of their own where that is faster.

    Returns:
        The graph. None if no activation treats each neuron by itself.
    """
    if all(mask_of(node, traced) is None for node in traced.graph.nodes):
        return None
    sites = _noted_sites(traced)
    network, kept = cut_constant_channels(traced)
    note_values(network)
    network, paths = split(network)
    lower_masks(network)
    note_values(network)
    network.recompile()
    neurons = {name: _states(node, traced) for name, node in sites.items()}
    for name, node in sites.items():
        count = sum(neurons[name].values())
        neurons[name] |= {"cut": count - kept.get(node, count), "split": paths.get(name, 0)}
    before, after = map(_multiplications, (traced, network))
    return TakenApart(network, neurons, {"before": before, "after": after})


def _noted_sites(traced: GraphModule) -> dict[str, Node]:
    """Return the output of each activation with masks, by the path of its module, and note the name at the node.

    Further calls of a module are numbered.
    """
    sites: dict[str, Node] = {}
    calls: Counter[str] = Counter()
    for node in traced.graph.nodes:
        if masks_of(node, traced) is not None:
            path = module_path(node)
            node.meta[SITE] = f"{path}:{calls[path]}" if calls[path] else path
            sites[node.meta[SITE]] = node
            calls[path] += 1
    return sites


def _states(node: Node, traced: GraphModule) -> dict[str, int]:
    """Return the number of neurons in each state at the output of an activation with masks."""
    masks = masks_of(node, traced)
    assert masks is not None
    active, linear = int(masks[0].sum()), int((masks[1] & ~masks[0]).sum())
    return {"active": active, "linear": linear, "constant": masks[0].numel() - active - linear}


def _multiplications(module: GraphModule) -> int:
    """Return the number of multiplications of the convolutions and linear layers of a graph."""
    count = 0
    for node in module.graph.nodes:
        for affine in read_node(node, module)[:1]:
            if affine.name and affine.build is not None and affine.axes is not None:
                shape = [size_of(size) for size in shape_of(affine.operand) or ()]
                count += affine.build(affine.axes).multiplications(shape)
    return count
