"""Replace activation modules, in place, by modules that activate only some of the neurons."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.sites.activations import activation_modules
from fastentropy.sites.fast_paths import replace_activation
from fastentropy.surgery.linearization import check_replaceable
from fastentropy.surgery.neuronwise import NeuronwiseActivation


@dataclass(frozen=True)
class ReplacedNeurons:
    """Name the neurons of a site (call of an activation) that are no longer activated.

    Attributes:
        neurons: the number of neurons of the site.
        linear: the indices of the neurons that are passed on unchanged.
        constant: the indices of the neurons that are replaced by 0.
        channel_axis: the axis of the neurons in the input of the activation, counted from the end.

    Examples:
        >>> import fastentropy as fe
        >>> fe.ReplacedNeurons(neurons=4, linear=(0, 2), constant=(3,), channel_axis=-1).linear
        (0, 2)
    """

    neurons: int
    linear: tuple[int, ...]
    constant: tuple[int, ...]
    channel_axis: int

    @classmethod
    def from_masks(cls, linear: Tensor, constant: Tensor, channel_axis: int) -> "ReplacedNeurons":
        """Name neurons by masks.

        Args:
            linear: bool [neurons], True for those that are passed on unchanged.
            constant: bool [neurons], True for those that are replaced by 0.
            channel_axis: the axis of the neurons in the input of the activation, counted from the end.

        Returns:
            The neurons.
        """
        on, off = (tuple(mask.nonzero().flatten().tolist()) for mask in (linear, constant))
        return cls(linear.numel(), on, off, channel_axis)

    def masks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the neurons as masks.

        Args:
            device: the device of the masks.

        Returns:
            The linear and the constant neurons, bool [neurons] each.
        """
        masks = torch.zeros(2, self.neurons, dtype=torch.bool, device="cpu")
        masks[0, list(self.linear)] = True
        masks[1, list(self.constant)] = True
        linear, constant = masks.to(device)
        return linear, constant


def known_axis(name: str, site: SiteStatistics) -> int:
    """Return the axis of the neurons of a site, counted from the end, or raise ValueError if its statistics do not tell it."""
    if site.channel_axis is None:
        text = f"the statistics do not tell on which axis the neurons of site {name!r} lie"
        raise ValueError(f"{text}; count with fe.collect(model), in passes whose inputs have the same axes")
    return site.channel_axis


def replace_neurons(model: nn.Module, replaced: Mapping[str, ReplacedNeurons]) -> None:
    """Replace activation modules by such that activate only the other neurons, in place.

    If an error is raised, nothing has been replaced.

    Args:
        model: the model, which is changed.
        replaced: the neurons by the name of their site. Those of a `NeuronwiseActivation` join the ones that it has.

    Raises:
        ValueError: a name is not that of an activation module that the model holds in one place, or the neurons do not fit the
            `NeuronwiseActivation` that is there.
    """
    modules = activation_modules(model)
    check_replaceable(model, modules, list(replaced))
    replacements = {
        name: _replacement(modules[name], neurons, _device_around(model, name)) for name, neurons in replaced.items()
    }
    for name, replacement in replacements.items():
        replace_activation(model, name, replacement)


def _replacement(module: nn.Module, replaced: ReplacedNeurons, device: torch.device) -> NeuronwiseActivation:
    """Return the module that replaces an activation module. If it replaces another one already, its neurons keep their states.

    Args:
        module: the activation module.
        replaced: the neurons that are no longer activated.
        device: where the new module has its buffers.
    """
    linear, constant = replaced.masks(device)
    values = None
    if isinstance(module, NeuronwiseActivation):
        linear, constant, values = linear | module.linear, constant | module.constant, module.values.flatten()
        module = module.activation
    return NeuronwiseActivation(module, linear, constant, values, channel_axis=replaced.channel_axis)


def _device_around(model: nn.Module, name: str) -> torch.device:
    """Return the device of the first tensor of a module, or of the smallest module around it that has one."""
    owner = model.get_submodule(name)
    tensor = next(chain(owner.buffers(), owner.parameters()), None)
    if tensor is not None:
        return tensor.device
    return _device_around(model, name.rpartition(".")[0]) if name else torch.device("cpu")
