"""Activations that count the states of their input per neuron, and fused chains of operators, on plain tensors.

A state is `off` (x < 0), `zero` (x == 0, of either sign) or `on` (x > 0), infinities included. NaN is in none of them.
"""

from fastentropy_kernels.activations import linear_regions
from fastentropy_kernels.chains.api import conv_bordered, conv_pointwise, linear_pair
from fastentropy_kernels.chains.validation import MOST_MIDDLES
from fastentropy_kernels.dispatch import available_implementations
from fastentropy_kernels.states.api import activation_states, count_states, plan_activation_states
from fastentropy_kernels.states.dispatch import is_fused
from fastentropy_kernels.states.plan import ActivationPlan

__all__ = [
    "MOST_MIDDLES",
    "ActivationPlan",
    "activation_states",
    "available_implementations",
    "conv_bordered",
    "conv_pointwise",
    "count_states",
    "is_fused",
    "linear_pair",
    "linear_regions",
    "plan_activation_states",
]
