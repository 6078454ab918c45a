"""Read nodes of a traced graph as affine operators.

A node is read as an affine operator if its ATen operator is affine in one operand and all other operands are constants. There
is a module for each family of operators.
"""

from fastentropy.fusion.chains.aten.affine_node import AffineNode, channelwise
from fastentropy.fusion.chains.aten.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fastentropy.fusion.chains.aten.elementwise import read_weighted_sum
from fastentropy.fusion.chains.aten.pooling import AVERAGE_POOLS, average
from fastentropy.fusion.chains.aten.reading import read_node
from fastentropy.fusion.chains.aten.reductions import Reduction, read_reduction
from fastentropy.fusion.chains.aten.selecting import read_concatenation
from fastentropy.fusion.chains.aten.views import read_view

__all__ = [
    "AVERAGE_POOLS",
    "CONVOLUTIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "AffineNode",
    "Reduction",
    "average",
    "channelwise",
    "read_concatenation",
    "read_node",
    "read_reduction",
    "read_view",
    "read_weighted_sum",
]
