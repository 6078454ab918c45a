"""Read operators that return their operand unchanged in eval mode."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy._compat import to_copy
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in
from fastentropy.fusion.chains.nodes import device_of, same_dtype

_aten = torch.ops.aten

#: Operators that return their first argument, and dropouts, which return it unless they are in training mode.
_IDENTITIES = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.positive.default,
}
_DROPOUTS = {
    *(_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default, _aten.feature_dropout_.default),
    *(_aten.alpha_dropout.default, _aten.alpha_dropout_.default),
    *(_aten.feature_alpha_dropout.default, _aten.feature_alpha_dropout_.default),
}

#: Casts. They return their first argument if it has the dtype and the device already.
_CASTS = {
    *(_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other, _aten.type_as.default),
    to_copy(),
}


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return {
        **dict.fromkeys(_IDENTITIES, _read_identity),
        **dict.fromkeys(_DROPOUTS, _read_dropout),
        **dict.fromkeys(_CASTS, _read_cast),
    }


def _read_identity(node: Node, module: GraphModule) -> AffineNode | None:
    """Read an operator that returns its first argument."""
    return affine_in(node.args[0], None)


def _read_dropout(node: Node, module: GraphModule) -> AffineNode | None:
    """Read dropout in eval mode, or of nothing."""
    return None if node.args[2] and node.args[1] else affine_in(node.args[0], None)


def _read_cast(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a cast to the dtype and the device that the value has."""
    operand = node.args[0]
    is_same = isinstance(operand, Node) and same_dtype(node, operand) and device_of(node) == device_of(operand)
    return affine_in(operand, None) if is_same else None
