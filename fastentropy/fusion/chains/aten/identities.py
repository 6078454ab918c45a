"""Read operators that return their operand unchanged in eval mode."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in

_aten = torch.ops.aten

#: Operators that return their first argument, and dropouts, which return it unless they are in training mode.
_IDENTITIES = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.positive.default,
}
_DROPOUTS = {_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default, _aten.feature_dropout_.default}


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return dict.fromkeys(_IDENTITIES, _read_identity) | dict.fromkeys(_DROPOUTS, _read_dropout)


def _read_identity(node: Node, module: GraphModule) -> AffineNode | None:
    """Read an operator that returns its first argument."""
    return affine_in(node.args[0], None)


def _read_dropout(node: Node, module: GraphModule) -> AffineNode | None:
    """Read dropout in eval mode, or of nothing."""
    return None if node.args[2] and node.args[1] else affine_in(node.args[0], None)
