"""Kernels for plain tensors: activations that count the states of their input, and fused chains of linear operators.

The state of a value `x` is *off* (x < 0), *zero* (x == 0, of either sign) or *on* (x > 0). Infinities count as off or on. NaN
has no state. States are counted per neuron: for each index of the channel axis, over all other axes.

A chain is a stretch of a network without an activation between its convolutions or linear layers. A fused chain runs as one
kernel.
"""

from fastentropy_kernels.activations import linear_regions
from fastentropy_kernels.chains.api import conv_bordered, conv_pointwise, linear_pair
from fastentropy_kernels.chains.validation import MOST_MIDDLES
from fastentropy_kernels.dispatch import available_implementations
from fastentropy_kernels.states.api import activation_states, count_states, plan_activation_states, plan_count_states
from fastentropy_kernels.states.dispatch import is_fused
from fastentropy_kernels.states.plan import ActivationPlan, CountPlan

__all__ = [
    "MOST_MIDDLES",
    "ActivationPlan",
    "CountPlan",
    "activation_states",
    "available_implementations",
    "conv_bordered",
    "conv_pointwise",
    "count_states",
    "is_fused",
    "linear_pair",
    "linear_regions",
    "plan_activation_states",
    "plan_count_states",
]
