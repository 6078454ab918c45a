"""Find the calls of activations in a program that torch.export has traced, with the input of each call."""

import functools
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Interpreter, Node

from fastentropy._compat import tree_leaves
from fastentropy.sites.activations import called_name, class_activation
from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.passes import Pass, Produced
from fastentropy.sites.registry import SiteRegistry
from fastentropy.sites.site import Site


class ExportedCall(NamedTuple):
    """A call of an activation in an exported program."""

    node: Node  # the first node of the call
    x: Node | None  # the input of the activation; None if several tensors may be the input
    path: str  # the path of the module; for a function, the path of the module that calls it and the name of the function
    name: str  # the name of the site
    activation: str


def exported_calls(program: ExportedProgram) -> list[ExportedCall]:
    """Return the calls of activations in a program, in call order."""
    calls: list[ExportedCall] = []
    seen, times = set[str](), Counter[str]()
    state = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind != InputKind.USER_INPUT}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        stack = node.meta.get("nn_module_stack") or {}
        module = next(((key, path, name) for key, (path, kind) in stack.items() if (name := _activation(kind))), None)
        if module is None:
            owner = list(stack.values())[-1][0] if stack else ""
            found = _function_call(node, owner, state)
        else:
            found = _module_call(node, *module, state) if module[0] not in seen else None
        if found is None:
            continue
        x, path, activation = found
        seen.update(module[:1] if module else ())
        number, times[path] = times[path], times[path] + 1
        calls.append(ExportedCall(node, x, path, f"{path}:{number}" if number else path, activation))
    return calls


def activations_in_branches(program: ExportedProgram) -> list[str]:
    """Return the activations that are called in programs within the program, such as branches of `torch.cond`, each once."""
    branches = [module for name, module in program.graph_module.named_modules() if name and isinstance(module, GraphModule)]
    found = [called_name(node.target) for branch in branches for node in branch.graph.nodes if node.op == "call_function"]
    return list(dict.fromkeys(name for name in found if name))


def _activation(kind: Any) -> str | None:
    """Return the activation of a class, given as the class or by its full name; None if it is not known or not imported."""
    found = _class_named(kind) if isinstance(kind, str) else kind
    return class_activation(found) if isinstance(found, type) else None


def _class_named(name: str) -> Any:
    """Return the class with a full name, or None if its module is not imported."""
    module, names = name, list[str]()
    while module and module not in sys.modules:
        module, _, last = module.rpartition(".")
        names.insert(0, last)
    return functools.reduce(lambda owner, each: getattr(owner, each, None), names, sys.modules.get(module))


def _function_call(node: Node, owner: str, state: Collection[str]) -> tuple[Node | None, str, str] | None:
    """Return the input, the path and the activation of a call that is an operator of its own; None if it is none."""
    activation, x = called_name(node.target), node.args[0] if node.args else None  # type: ignore[arg-type]
    if activation is None or not isinstance(x, Node) or not _is_countable(x, state):
        return None
    function = str(node.target).split(".")[1].strip("_")
    return x, f"{owner}.{function}".lstrip("."), activation


def _module_call(
    node: Node, key: str, path: str, activation: str, state: Collection[str]
) -> tuple[Node | None, str, str] | None:
    """Return the input, the path and the activation of a call of a module, of which `node` is a part; None if it reads none."""
    read = [x for x in node.all_input_nodes if _is_countable(x, state) and key not in (x.meta.get("nn_module_stack") or {})]
    return (read[0] if len(read) == 1 else None, path, activation) if read else None


def _is_countable(x: Node, state: Collection[str]) -> bool:
    """Return whether a node has neurons to count: a floating-point tensor with axes that is not among the weights by name."""
    value = x.meta.get("val")
    return isinstance(value, Tensor) and x.name not in state and value.is_floating_point() and value.ndim > 0


def exported_sites(
    program: ExportedProgram, calls: Collection[ExportedCall], channel_axis: Mapping[str, int], exclude: Collection[str]
) -> dict[str, Site]:
    """Return the sites of calls in a program by name, without those that are excluded.

    The program runs once on its example inputs, and every operator is followed to find out where the neurons lie.

    Args:
        program: the program, which has example inputs.
        calls: the calls of activations in it.
        channel_axis: the axis of the neurons, by name of the site, where it should not be inferred.
        exclude: names of sites, or patterns of names, that are left out.

    Raises:
        ValueError: the input of a site that is not left out is not known.
    """
    registry = SiteRegistry(lambda path: nn.Module, channel_axis, exclude, "raise")
    for call in calls:
        if call.x is None and not registry.is_left_out(call.name):
            raise ValueError(
                f"site {call.name!r} reads several tensors, and which is its input is not known; leave it out with "
                f"exclude=[{call.name!r}]"
            )
    module = program.module()
    assert isinstance(module, GraphModule)
    assert program.example_inputs is not None
    changed = [value for value in (*module.buffers(), *program.constants.values()) if isinstance(value, Tensor)]
    follower = _Follower(module, {call.node.name: call for call in calls}, registry)
    follower.follow(tree_leaves(program.example_inputs), changed)
    if lost := [call.name for call in calls if call.name not in registry.sites and not registry.is_left_out(call.name)]:
        raise ValueError(f"site {lost[0]!r} was not found again when the program ran; leave it out with exclude=[{lost[0]!r}]")
    registry.warn_of_inferred()
    return registry.sites


class _Follower(Interpreter):
    """Runs a program while the axes of its values are followed, and adds the sites of its calls to a registry."""

    def __init__(self, module: GraphModule, calls: Mapping[str, ExportedCall], registry: SiteRegistry) -> None:
        super().__init__(module)
        self.extra_traceback = False  # of the graph, in messages of errors
        self._calls, self._registry = calls, registry
        self._pass = Pass[None]("", None, AxisTracker(module.parameters()), Produced())

    def follow(self, inputs: list[Any], changed: list[Tensor]) -> None:
        """Run the program on inputs in flat order, and undo it.

        Args:
            inputs: the inputs, which are not changed.
            changed: the buffers and constants, to which the program may write. Afterwards they have their values again.
        """
        befores = [value.clone() for value in changed]
        copies = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        tracker = self._pass.tracker
        assert tracker is not None
        try:
            with torch.no_grad(), torch.random.fork_rng(), tracker.following():
                self.run(*copies, enable_io_processing=False)
        finally:
            for value, before in zip(changed, befores, strict=True):
                value.copy_(before)

    def run_node(self, n: Node) -> Any:
        """Run a node. If it is the first one of a call, the site of the call is added before."""
        if (call := self._calls.get(n.name)) is not None and call.x is not None:
            x = n.all_input_nodes[call.node.all_input_nodes.index(call.x)]  # by place: an input may have another name here
            self._registry.resolve(call.name, call.path, call.activation, self.env[x], self._pass)
        return super().run_node(n)
