"""Run a fused network: as it is, compiled by torch.compile, or in ONNX Runtime."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from fastentropy.fusion.backends.functional import writing_new_values
from fastentropy.fusion.backends.inductor import Compiled
from fastentropy.fusion.backends.onnx_runtime import OnnxSession
from fastentropy.fusion.traced_inputs import TracedInputs

#: What may run a fused network. "auto" measures all that can run here, and takes the fastest one.
Backend = Literal["eager", "inductor", "auto", "onnxruntime"]


def make_runner(backend: str, network: nn.Module, inputs: TracedInputs) -> Callable[..., Any]:
    """Return a function that runs a network in a backend, called with the inputs of the network.

    Args:
        backend: "eager", "inductor" or "onnxruntime".
        network: the network.
        inputs: the inputs with which it was traced.

    Raises:
        ImportError: a package that the backend needs is missing.
        ValueError: the network cannot be exported for the backend.
    """
    if backend == "inductor":
        return Compiled(writing_new_values(network, inputs))
    if backend == "onnxruntime":
        return OnnxSession(network, inputs)
    return network
