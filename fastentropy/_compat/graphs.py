"""The graphs of Dynamo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastentropy._compat.lookup import attribute, named


def own_graph(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a copy of a graph, with the graphs inside of it, that may be changed. Dynamo goes on reading its own."""
    graph, copies = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
    result = graph.graph_copy(graph_module.graph, copies)
    output = graph.output(result)
    output.meta = dict(graph_module.graph.output_node().meta)
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    own = torch.fx.GraphModule(graph_module, graph)
    own.meta = dict(graph_module.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason", "_backend_id"):
        if hasattr(graph_module, name):
            setattr(own, name, getattr(graph_module, name))
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(body := getattr(own, node.target, None), torch.fx.GraphModule):
            setattr(own, node.target, own_graph(body))
    return own


def bodies(node: torch.fx.Node) -> list[torch.fx.GraphModule]:
    """Return the graphs that a node runs: those of a higher-order operator, such as a checkpoint; empty for any other node."""
    if not isinstance(node.target, named("torch._ops", "HigherOrderOperator")):
        return []
    found = []
    for argument in torch.fx.node.map_arg([*node.args, *node.kwargs.values()], lambda each: each):
        if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
            body = getattr(node.graph.owning_module, str(argument.target), None)
            found += [body] if isinstance(body, torch.fx.GraphModule) else []
    return found


def is_checkpoint(node: torch.fx.Node) -> bool:
    """Return whether a node is an activation checkpoint, which returns what its graph returns."""
    return node.target is named("torch._higher_order_ops.wrap", "tag_activation_checkpoint")


def size_of(size: Any) -> int:
    """Return a size of the tensor that a tracer has seen."""
    return size if isinstance(size, int) else int(attribute(size, "node").hint)


def identity_in_stack(key: Any) -> int:
    """Return the identity of the module of a key of a node's `nn_module_stack`; -1 if the key tells none."""
    digits = str(key).partition("@")[0]
    return int(digits) if digits.isdigit() else -1


def without_values(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the shape, the strides, the dtype and the device of another one, but without its values."""
    like: torch.Tensor = named("torch._subclasses", "FakeTensorMode")().from_tensor(x)
    return like


def in_fake_mode_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which new tensors have no values, like `x` of a tracer."""
    mode: AbstractContextManager[object] = attribute(x, "fake_mode")
    return mode


@contextlib.contextmanager
def in_trace_of(x: torch.Tensor) -> Iterator[None]:
    """Let operators compute shapes alone while the context is active, as in the trace that `x` is from, for free sizes too."""
    with in_fake_mode_of(x), named("torch._dispatch.python", "enable_python_dispatcher")():
        yield


def add_input(graph: torch.fx.Graph, name: str, value: torch.Tensor) -> torch.fx.Node:
    """Add an input to a graph of Dynamo, behind the others. `value` is what the tracer knows of it."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    node._dynamo_source = None  # as DDP does for inputs that do not come from the user
    return node
