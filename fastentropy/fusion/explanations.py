"""Say why no chain (stretch of linear operators) of a model was fused."""

from collections import Counter

from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten import read_node, read_view
from fastentropy.fusion.chains.finding import described

#: How many operators are named.
_MOST_NAMES = 3


def why_nothing_is_fused(traced: GraphModule) -> str:
    """Return why a model has no chain of two or more operators, in one line.

    Args:
        traced: the graph of the model.
    """
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    linear = [(node, affine.name) for node in calls for affine in read_node(node, traced) if affine.name]
    if not linear:
        kinds = Counter(described(node).partition(" in ")[0] for node in calls)
        found = ", ".join(name for name, _ in kinds.most_common(_MOST_NAMES))
        return f"nothing to fuse: no convolution or linear layer with constant weights; the model runs {found or 'no operator'}"
    behind = [f"{name} is followed by {_followers(node)}" for node, name in linear[:_MOST_NAMES]]
    more = [f"and so on for {len(linear) - _MOST_NAMES} more"] if len(linear) > _MOST_NAMES else []
    advice = "fe.linearize takes activations out of the way"
    return f"nothing to fuse: no chain of two linear operators: {', '.join(behind + more)}; {advice}"


def _followers(node: Node) -> str:
    """Return the operators that read the output of a node, behind views of it."""
    users = list(node.users)
    while len(users) == 1 and read_view(users[0]):
        users = list(users[0].users)
    names = dict.fromkeys("the output" if user.op == "output" else described(user) for user in users)
    return " and ".join(names) or "nothing"
