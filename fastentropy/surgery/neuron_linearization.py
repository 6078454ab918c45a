"""Replace activations neuron by neuron: by the identity where a neuron is always on, by 0 where it is never on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fastentropy._utils.errors import nearest_names
from fastentropy._utils.text import format_integer, format_table, plural
from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics, check_statistics
from fastentropy.sites.activations import activation_modules, activation_name, has_registered_functions, own_modules
from fastentropy.sites.inputs import check_model, described
from fastentropy.surgery.neuron_replacement import ReplacedNeurons, known_axis, replace_neurons
from fastentropy.surgery.neuronwise import NeuronwiseActivation
from fastentropy.surgery.site_names import named_as_now

#: The activations that are the identity for inputs above 0, and those that are 0 for inputs below 0. Of ReLU6, the counters do
#: not tell whether a neuron was ever above 6.
_IDENTITY_ABOVE_0 = frozenset({"relu", "leaky_relu", "prelu", "rrelu", "elu", "celu"})
_ZERO_BELOW_0 = frozenset({"relu", "relu6"})
_KNOWN = _IDENTITY_ABOVE_0 | _ZERO_BELOW_0


@dataclass(frozen=True)
class NeuronStates:
    """Tell how many neurons of a site (call of an activation) are in each state.

    Attributes:
        activation: the name of the activation that the active neurons have.
        active: the number of neurons to which the activation is applied.
        linear: the number of neurons that are passed on unchanged.
        constant: the number of neurons that are replaced by a constant.

    Examples:
        >>> import fastentropy as fe
        >>> fe.NeuronStates("relu", active=5, linear=2, constant=1).linear
        2
    """

    activation: str
    active: int
    linear: int
    constant: int


class NeuronStatesBySite(dict[str, NeuronStates]):
    """Map the name of each site to the states of its neurons, in call order. `print` shows a table."""

    def __str__(self) -> str:
        """Return a table with a row for each site, a line that sums up all sites, and the activations that had to stay."""
        head = ["site", "activation", "active", "linear", "constant"]
        numbers = [(site.active, site.linear, site.constant) for site in self.values()]
        rows = [
            [name, site.activation, *map(format_integer, row)] for (name, site), row in zip(self.items(), numbers, strict=True)
        ]
        sums = [sum(column) for column in zip((0, 0, 0), *numbers, strict=True)]
        active, linear, constant = map(format_integer, sums)
        total = f"{plural(sum(sums), 'neuron')}: {active} active, {linear} linear, {constant} constant"
        kept = [name for name in dict.fromkeys(site.activation for site in self.values()) if name not in _KNOWN]
        legend = f"\nleft as they are, since they are in no state exactly linear or 0: {', '.join(kept)}" if kept else ""
        return f"{format_table(head, rows, left=2)}\n\n{total}{legend}"


def linearize_neurons(
    model: nn.Module, statistics: Statistics, *, max_entropy: float = 0.0, min_observations: int = 1000
) -> NeuronStatesBySite:
    """Replace the activation of the neurons that hardly ever change their state, in place.

    Each activation module with such neurons becomes a `NeuronwiseActivation`. Neurons that are mostly on become linear, and
    those that are mostly off become 0. With `max_entropy=0` these are the neurons that never changed their state, and the
    outputs for the data that was counted stay as they were, except for NaN.

    - ReLU: both.
    - LeakyReLU, PReLU, RReLU, ELU and CELU: neurons that are mostly on become linear. The others stay as they are.
    - ReLU6: neurons that are mostly off become 0. The others stay as they are, because the counts do not tell whether an input
      was above 6.
    - All other activations, such as GELU and SiLU, and subclasses of the above stay as they are. They are in no state exactly
      linear or constant, or it is not known.

    If an error is raised, nothing has been replaced.

    Args:
        model: the model, which is changed.
        statistics: what a collector has counted on this model. Activations that were not counted stay as they are. In a
            `NeuronwiseActivation`, only the active neurons are considered. The number of neurons is checked in the next call
            of the model, because modules do not tell it.
        max_entropy: the largest entropy, in bits, of a neuron that is replaced, from 0 to 1.
        min_observations: how many values of each neuron must have been counted. If a state never occurred in n independent
            values, it occurs in less than a share of 3 / n of them (at a confidence of 95 %).

    Returns:
        A dict from the name of each site to its `NeuronStates`, in call order. `print` shows a table.

    Raises:
        ValueError: the statistics are those of another model, count less than `min_observations` values of a neuron, or do not
            tell the axis of the neurons; a site with neurons to replace is a call of a function, or one of several calls of a
            module; the model holds its module under several names; `max_entropy` or `min_observations` is out of range.
        TypeError: `model` is not a module, or `statistics` are something else.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> _ = torch.nn.init.constant_(model[0].bias, 100.0)  # so that all neurons are always on
        >>> with fe.collect(model) as collector:
        ...     y = model(torch.randn(1000, 3))
        >>> fe.linearize_neurons(model, collector.compute())
        {'1': NeuronStates(activation='relu', active=0, linear=4, constant=0)}
        >>> model[1].linear
        tensor([True, True, True, True])
    """
    check_model(model)
    _check_arguments(statistics, max_entropy, min_observations)
    statistics, modules = named_as_now(statistics, model), activation_modules(model)
    _check_same_model(model, modules, statistics)
    replaced: dict[str, ReplacedNeurons] = {}
    own = own_modules(model, list(statistics))
    for name, site in statistics.items():
        linear, constant = _replaced_neurons(site, modules.get(name.partition(":")[0]), max_entropy)
        if bool((linear | constant).any()):
            axis = _check_site(name, site, name in own, linear | constant, min_observations)
            replaced[name] = ReplacedNeurons.from_masks(linear, constant, axis)
    replace_neurons(model, replaced)
    modules = activation_modules(model)
    states = {name: _states(site, modules.get(name.partition(":")[0])) for name, site in statistics.items()}
    return NeuronStatesBySite(states)


def _check_arguments(statistics: object, max_entropy: object, min_observations: object) -> None:
    """Raise if an argument of `linearize_neurons` is of another kind, or out of its range."""
    check_statistics(statistics)
    if not isinstance(max_entropy, int | float) or not 0 <= max_entropy <= 1:
        raise ValueError(f"max_entropy: got {described(max_entropy)}, expected a number of bits from 0 to 1")
    if not isinstance(min_observations, int) or min_observations < 1:
        raise ValueError(f"min_observations: got {described(min_observations)}, expected a whole number of at least 1")


def _check_same_model(model: nn.Module, modules: Mapping[str, nn.Module], statistics: Statistics) -> None:
    """Raise ValueError if the sites of the statistics are not calls of activations of the model, as far as modules tell.

    Args:
        model: the model.
        modules: its activation modules by path.
        statistics: the statistics.
    """
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for name, site in statistics.items():
        path = name.partition(":")[0]
        module = modules.get(path)
        if module is None and not _may_be_function(path, site.activation, paths):
            nearest = f"; the nearest are {nearest_names(name, modules)}" if modules else ""
            raise ValueError(f"the statistics are not of this model, which has no activation {name!r}{nearest}")
        found = site.activation if module is None else activation_name(module)
        if isinstance(module, NeuronwiseActivation) and module.active.numel() != site.neurons:
            found = f"{found} with {plural(module.active.numel(), 'neuron')}"
        if found != site.activation:
            counted = f"{site.activation} with {plural(site.neurons, 'neuron')}"
            raise ValueError(
                f"the statistics are not of this model as it is now: site {name!r} is {found}, and {counted} in the statistics"
            )


def _may_be_function(path: str, activation: str, paths: Collection[str]) -> bool:
    """Return whether a path is one that calls of a function have: that of a module, and the name of the function.

    Args:
        path: the path.
        activation: the name of the activation, with which the name of a function of PyTorch begins.
        paths: the paths of all modules of the model.
    """
    owner, _, function = path.rpartition(".")
    return path not in paths and owner in paths and (function.startswith(activation) or has_registered_functions())


def _replaced_neurons(site: SiteStatistics, module: nn.Module | None, max_entropy: float) -> tuple[Tensor, Tensor]:
    """Return which neurons of a site become linear, and which become 0, bool [neurons] each.

    Args:
        site: the statistics of the site.
        module: the activation module; None if the site is a call of a function.
        max_entropy: the largest entropy in bits of such a neuron.
    """
    off, _, on = site.counts.cpu().unbind(1)
    activation, candidates = site.activation, site.entropy().cpu() <= max_entropy
    if isinstance(module, NeuronwiseActivation):
        candidates &= module.active.cpu()
        module = module.activation
        activation = activation_name(module) or ""
    is_known = module is None or type(module).__module__ == nn.ReLU.__module__  # a subclass may compute something else
    linear = candidates & (on > off) & (is_known and activation in _IDENTITY_ABOVE_0)
    constant = candidates & (on <= off) & (is_known and activation in _ZERO_BELOW_0)
    return linear, constant


def _check_site(name: str, site: SiteStatistics, is_own: bool, replaced: Tensor, min_observations: int) -> int:
    """Return the axis of the neurons of a site, counted from the end, or raise ValueError if they cannot be replaced.

    Args:
        name: the name of the site.
        site: its statistics.
        is_own: whether it has a module of its own.
        replaced: bool [neurons], True for the neurons to replace.
        min_observations: how many values of each of them must have been counted.
    """
    if not is_own:
        raise ValueError(
            f"site {name!r} has neurons to replace, but no module of its own; make one with fe.isolate(model, example_inputs)"
        )
    observations = int(site.counts.sum(1).cpu()[replaced].min())
    if observations < min_observations:
        raise ValueError(
            f"site {name!r} has a neuron to replace of which {plural(observations, 'value')} were counted, expected at least "
            f"{format_integer(min_observations)}; collect on more data, or set min_observations"
        )
    return known_axis(name, site)


def _states(site: SiteStatistics, module: nn.Module | None) -> NeuronStates:
    """Return how many neurons of a site are in each state, if `module` is called there; None is a function."""
    if not isinstance(module, NeuronwiseActivation):
        return NeuronStates(site.activation, site.neurons, 0, 0)
    numbers = (int(mask.sum()) for mask in (module.active, module.linear, module.constant))
    return NeuronStates(activation_name(module.activation) or type(module.activation).__name__, *numbers)
