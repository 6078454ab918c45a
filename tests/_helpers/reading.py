"""Read single nodes of traced graphs."""

import torch

from fastentropy.fusion.chains import aten
from fastentropy.fusion.tracing import prepared_module
from tests._helpers.networks import Holder


def read_node(node, module):
    """Return the first reading of a node as an affine operator, or None."""
    return next(iter(aten.read_node(node, module)), None)


def read_output(function, x, **constants):
    """Return the readings of the node that a function of constants and x returns, and what it returns.

    Args:
        function: called as `function(constants, x)`, where the constants are attributes.
        x: the input.
        constants: tensors by name.
    """
    model = Holder(function, **constants)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (x,), dynamic_shapes={"x": batch})
    module = prepared_module(program)
    (output,) = module.graph.find_nodes(op="output")
    (node,) = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    return aten.read_node(node, module), model(x)
