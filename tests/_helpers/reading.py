"""Read single nodes of traced graphs."""

from fastentropy.fusion.chains import aten


def read_node(node, module):
    """Return the first reading of a node as an affine operator, or None."""
    return next(iter(aten.read_node(node, module)), None)
