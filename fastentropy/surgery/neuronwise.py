"""An activation that treats each neuron by itself: it activates it, passes it on, or puts a constant in its place."""

import torch
from torch import Tensor, nn


class NeuronwiseActivation(nn.Module):
    """Apply an activation to some neurons, the identity to others, and put a constant in the place of the rest.

    It stands in for an activation module whose neurons do not all need it. `linearize_neurons` makes such modules; fastentropy
    treats them as activations with the name "neuronwise". The output has the shape and the dtype of that of the activation.

    Args:
        activation: the activation module that this module stands in for. It computes the active neurons.
        linear: bool [neurons], True for neurons that are passed on unchanged.
        constant: bool [neurons], True for neurons that are replaced by their value in `values`. Neurons that are neither
            linear nor constant are active.
        values: floating-point [neurons], the outputs of the constant neurons. None is 0 for all of them.
        channel_axis: the axis of the input whose entries are the neurons, counted from the end: -1 after a linear layer,
            -2, -3 and -4 after a convolution in one, two and three dimensions.

    Raises:
        ValueError: `linear`, `constant` and `values` are no such tensors, a neuron is both linear and constant, or the axis is
            not negative.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> linear, constant = torch.tensor([[False, True, False], [False, False, True]])
        >>> activation = fe.NeuronwiseActivation(torch.nn.ReLU(), linear, constant, channel_axis=-1)
        >>> activation(torch.tensor([[-1.0, -1.0, -1.0], [2.0, 2.0, 2.0]]))
        tensor([[ 0., -1.,  0.],
                [ 2.,  2.,  0.]])
    """

    is_active: Tensor
    is_linear: Tensor
    values: Tensor

    def __init__(
        self,
        activation: nn.Module,
        linear: Tensor,
        constant: Tensor,
        values: Tensor | None = None,
        *,
        channel_axis: int,
    ) -> None:
        """Keep the activation, and the states of the neurons as buffers of a shape that broadcasts against inputs."""
        super().__init__()
        values = torch.zeros(linear.shape, dtype=torch.float32, device=linear.device) if values is None else values
        _check_states(linear, constant, values, channel_axis)
        self.activation = activation
        self.channel_axis = channel_axis
        shape = [-1] + [1] * (-1 - channel_axis)
        self.register_buffer("is_active", ~(linear | constant).view(shape))
        self.register_buffer("is_linear", linear.clone().view(shape))
        self.register_buffer("values", values.clone().view(shape))

    @property
    def active(self) -> Tensor:
        """Return a bool tensor [neurons]: True if the activation is applied to the neuron."""
        return self.is_active.flatten()

    @property
    def linear(self) -> Tensor:
        """Return a bool tensor [neurons]: True if the neuron is passed on unchanged."""
        return self.is_linear.flatten()

    @property
    def constant(self) -> Tensor:
        """Return a bool tensor [neurons]: True if the neuron is replaced by a constant."""
        return ~(self.is_active | self.is_linear).flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all neurons.

        Args:
            x: the input, floating-point, with the neurons on the axis `channel_axis`.

        Returns:
            The output, of the shape of `x`.

        Raises:
            ValueError: `x` has another number of neurons.
        """
        neurons = self.is_active.shape[0]
        if x.ndim < -self.channel_axis or x.shape[self.channel_axis] != neurons:
            raise ValueError(f"got an input of shape {list(x.shape)}, expected {neurons} neurons on axis {self.channel_axis}")
        # Before the activation, which may write over x. A collector takes the first tensor that is read here for the input.
        others = torch.where(self.is_linear, x, self.values)
        y: Tensor = self.activation(x)
        return torch.where(self.is_active, y, others.to(y.dtype))

    def extra_repr(self) -> str:
        """Describe the module in the text that `print` shows.

        Returns:
            The number of neurons and their axis.
        """
        return f"neurons={self.is_active.shape[0]}, channel_axis={self.channel_axis}"


def _check_states(linear: Tensor, constant: Tensor, values: Tensor, channel_axis: int) -> None:
    """Raise ValueError if these are no states of neurons. The arguments are those of `NeuronwiseActivation`."""
    if any(mask.dtype != torch.bool or mask.ndim != 1 for mask in (linear, constant)) or linear.shape != constant.shape:
        given = " and ".join(f"{mask.dtype} {list(mask.shape)}" for mask in (linear, constant))
        raise ValueError(f"linear and constant: got {given}, expected torch.bool [neurons] for both")
    if values.shape != linear.shape or not values.is_floating_point():
        raise ValueError(f"values: got {values.dtype} {list(values.shape)}, expected floating-point {list(linear.shape)}")
    if bool((linear & constant).any()):
        raise ValueError("a neuron is both linear and constant, expected at most one of them")
    if channel_axis >= 0:
        raise ValueError(f"channel_axis: got {channel_axis}, expected a negative number, which counts from the end")
