"""Find the calls of activations in a graph that torch.compile has traced, with the input of each call."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastentropy._compat import UncountableGraphError, bodies, has_pre_hooks, identity_in_stack, is_checkpoint
from fastentropy.sites.activations import called_name, function_name
from fastentropy.sites.modules import ACTIVATION, CONTAINER, NEUTRAL, WatchedModules

#: Functions of PyTorch that call activations, where no node shows them.
_WITH_ACTIVATIONS = frozenset(
    getattr(torch, name) for name in ("_transformer_encoder_layer_fwd", "rnn_relu", "rnn_relu_cell") if hasattr(torch, name)
)

#: A line of the stack trace of a node: file, number, function.
_TRACED = re.compile(r'File "(.*)", line (\d+), in (\S+)')


class TracedCall(NamedTuple):
    """A call of an activation in a graph."""

    node: fx.Node  # the first node of the call
    x: fx.Node  # the input of the activation
    path: str  # the path of the activation module; for a function, the path of the module that calls it
    activation: str
    function: str  # the name of the function; empty for a module
    producer: str | None  # the path of the module of the graph that ran before the call; None if none did
    line: tuple[str, int] | None  # the file and the line that call a function
    containers: tuple[str, ...]  # the paths of the containers that are running inside of the graph


class _Module(NamedTuple):
    """A module that is running when a node is."""

    key: str  # another one for each call
    path: str
    module: nn.Module
    kind: str


class GraphTracer:
    """Follow the nodes of a graph, in the order in which they run, and find the calls of activations.

    Attributes:
        calls: the calls that were found.
        producer: the path of the module of the graph that has returned last; None if none has.
    """

    def __init__(self, modules: WatchedModules, owner: str, others: Collection[int]) -> None:
        """Begin without calls.

        Args:
            modules: the modules of the model.
            owner: the path of the container whose forward is traced.
            others: the identities of modules that are watched by others.
        """
        self.calls: list[TracedCall] = []
        self.producer: str | None = None
        self._modules, self._owner, self._others = modules, owner, others
        self._ids = {id(module): (path, module, kind) for path, (module, kind) in modules.kinds.items()}
        self._seen, self._running = set[str](), list[_Module]()

    def follow(self, graph: fx.Graph) -> None:
        """Follow a graph of Dynamo, of which the nodes tell the modules that were running.

        Raises:
            UncountableGraphError: it is not known which activations the graph calls, or on which input.
        """
        for node in graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            _check(node, self._others)
            if inner := bodies(node):
                self._follow_bodies(node, inner)
                continue
            self._enter(list(_running(node, self._ids)))
            call = self._call(node)
            if call is not None:
                self.calls.append(call)

    def finish(self) -> None:
        """Let all modules return."""
        self._enter([])

    def _enter(self, running: list[_Module]) -> None:
        """Note which modules are running now. The others have returned."""
        for module in _returned(self._running, running):
            self.producer = module.path
        self._running = running

    def _follow_bodies(self, node: fx.Node, inner: Sequence[fx.GraphModule]) -> None:
        """Follow the graphs that a node runs. Only a checkpoint may call activations."""
        before = len(self.calls)
        for body in inner:
            self.follow(body.graph)
        if len(self.calls) > before and not (is_checkpoint(node) and len(inner) == 1):
            raise UncountableGraphError(f"activations are called inside of {_name(node.target)}")

    def _call(self, node: fx.Node) -> TracedCall | None:
        """Return the call of an activation that begins with a node; None if none does."""
        running = self._running
        containers = tuple(each.path for each in running if each.kind == CONTAINER and each.path != self._owner)
        inside = next((module for module in running if module.kind == ACTIVATION), None)
        if inside is None:
            return _function_call(node, self._owner, containers, self.producer)
        if inside.key in self._seen:
            return None
        call = _module_call(node, inside, containers, self.producer, self._modules)
        if call is not None:
            self._seen.add(inside.key)
        return call


def _check(node: fx.Node, others: Collection[int]) -> None:
    """Raise for a node in which activations may be called that cannot be counted."""
    if node.op == "call_module":
        raise UncountableGraphError(f"it calls the module {node.target} as a whole")
    if node.target in _WITH_ACTIVATIONS:
        raise UncountableGraphError(f"{_name(node.target)} hides the activations that it calls")
    if others and any(identity_in_stack(key) in others for key in node.meta.get("nn_module_stack") or ()):
        raise UncountableGraphError("it has modules to which another collector is attached")


def _running(node: fx.Node, ids: Mapping[int, tuple[str, nn.Module, str]]) -> Iterator[_Module]:
    """Return the modules of the model that are running when a node is, outermost first."""
    for key in node.meta.get("nn_module_stack") or ():
        known = ids.get(identity_in_stack(key))
        if known is not None:
            yield _Module(str(key), *known)


def _returned(before: list[_Module], now: list[_Module]) -> Iterator[_Module]:
    """Return the modules that have returned between two nodes, in their order, without those that compute nothing."""
    same = 0
    while same < min(len(before), len(now)) and before[same].key == now[same].key:
        same += 1
    return (module for module in reversed(before[same:]) if module.kind != NEUTRAL)


def _function_call(node: fx.Node, owner: str, containers: tuple[str, ...], producer: str | None) -> TracedCall | None:
    """Return the call of an activation function that a node is; None if it is none."""
    function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    activation = None if function is None else function_name(function) or called_name(function)
    x: Any = node.args[0] if node.args else node.kwargs.get("input")
    if activation is None or not is_countable_node(x):
        return None
    found = _TRACED.findall(node.meta.get("stack_trace") or "")
    line = (found[-1][0], int(found[-1][1])) if found else None
    caller = containers[-1] if containers else owner
    return TracedCall(node, x, caller, activation, _name(function).strip("_"), producer, line, containers)


def _module_call(
    node: fx.Node, module: _Module, containers: tuple[str, ...], producer: str | None, modules: WatchedModules
) -> TracedCall | None:
    """Return the call of an activation module to which a node belongs; None if the node does not read the input."""
    if has_pre_hooks(module.module):
        raise UncountableGraphError(f"hooks may change the input of {module.path!r}")
    inputs = [x for x in node.all_input_nodes if is_countable_node(x) and not _is_inside(x, module.key)]
    if not inputs:
        return None
    return TracedCall(node, inputs[0], module.path, modules.activations[module.path], "", producer, None, containers)


def _is_inside(x: fx.Node, key: str) -> bool:
    """Return whether a value is computed inside of a call of a module."""
    return x.op not in ("placeholder", "get_attr") and key in {str(each) for each in x.meta.get("nn_module_stack") or ()}


def is_countable_node(x: Any) -> bool:
    """Return whether a node has neurons to count: a floating-point tensor with axes that is not a parameter."""
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_floating_point() and value.ndim > 0


def _name(function: Any) -> str:
    """Return the name of a function or of an overload of an operator."""
    return str(getattr(getattr(function, "overloadpacket", function), "__name__", "function"))
