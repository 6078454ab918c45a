"""Choose the neurons whose activation is removed next: those of lowest entropy over the whole network."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics
from fastentropy.pruning.options import Options
from fastentropy.sites.activations import activation_modules, activation_name
from fastentropy.surgery.neuron_replacement import ReplacedNeurons, known_axis
from fastentropy.surgery.neuronwise import NeuronwiseActivation

#: The activations that are 0, or close to it, for most inputs below 0. A neuron of theirs that is mostly off becomes 0. Of all
#: other activations only neurons that are mostly on are replaced.
_NEAR_ZERO_BELOW_0 = frozenset(
    {"relu", "relu6", "leaky_relu", "rrelu", "gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "hardswish"}
)


def next_neurons(
    model: nn.Module, statistics: Statistics, options: Options
) -> tuple[tuple[str, ...], dict[str, ReplacedNeurons]]:
    """Return which neurons are replaced next: `per_step` percent of all neurons, those with the lowest scores first.

    Among equal scores, the first in call order are taken.

    Args:
        model: the current model.
        statistics: its statistics.
        options: the options of the run.

    Returns:
        The names of the sites (calls of activations) all of whose neurons are linear then, and the neurons by site.

    Raises:
        ValueError: the statistics do not tell on which axis the neurons of a site lie.
    """
    modules = activation_modules(model)
    sites = {name: site for name, site in statistics.items() if name in modules and name not in options.protect}
    candidates = {name: _candidates(site, modules[name]) for name, site in sites.items()}
    scores = {name: _scores(site, candidates[name].sum(0) > 0, options) for name, site in sites.items()}
    count = math.ceil(options.per_step / 100 * sum(site.neurons for site in sites.values()))
    chosen = _lowest(scores, count)
    linear, replaced = [], {}
    for name, mask in chosen.items():
        masks = candidates[name] & mask
        if bool(mask.any()):
            replaced[name] = ReplacedNeurons.from_masks(masks[0], masks[1], known_axis(name, sites[name]))
        if bool((masks[0] | _linear(modules[name], masks[0])).all()):
            linear.append(name)
    return tuple(linear), replaced


def _candidates(site: SiteStatistics, module: nn.Module) -> Tensor:
    """Return the active neurons of a site that could become linear, and those that could become 0, bool [2, neurons].

    Args:
        site: the statistics of the site.
        module: its activation module.
    """
    off, _, on = site.counts.cpu().unbind(1)
    active, activation = torch.ones(site.neurons, dtype=torch.bool, device="cpu"), site.activation
    if isinstance(module, NeuronwiseActivation):
        active, activation = module.active.cpu(), activation_name(module.activation) or ""
    constant = on <= off if activation in _NEAR_ZERO_BELOW_0 else torch.zeros_like(active)
    return active & torch.stack([on > off, constant])


def _scores(site: SiteStatistics, is_candidate: Tensor, options: Options) -> Tensor:
    """Return a score for each neuron of a site, float64 [neurons]; infinity for those that cannot be replaced.

    Args:
        site: the statistics of the site.
        is_candidate: bool [neurons], whether the neuron can be replaced.
        options: the options of the run: the criterion.
    """
    if options.criterion == "random":
        scores = torch.rand(site.neurons, dtype=torch.float64, device="cpu")
    else:
        scores = site.entropy(options.zero, options.average).cpu()
    return scores.masked_fill(~is_candidate, math.inf)


def _lowest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return a mask for each site, bool [neurons], that selects the `count` neurons of lowest finite score in all of them."""
    if not scores:
        return {}
    flat = torch.cat(list(scores.values()))
    order = torch.argsort(flat, stable=True)[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool, device="cpu")
    mask[order] = flat[order] < math.inf
    parts = torch.split(mask, [len(each) for each in scores.values()])
    return dict(zip(scores, parts, strict=True))


def _linear(module: nn.Module, like: Tensor) -> Tensor:
    """Return which neurons of a module are linear already, bool [neurons], as many as `like` has."""
    return module.linear.cpu() if isinstance(module, NeuronwiseActivation) else torch.zeros_like(like)
