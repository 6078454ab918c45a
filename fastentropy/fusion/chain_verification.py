"""Judge each rewritten chain (stretch of linear operators) by itself, and rewrite those chains of a network that hold.

The error of a chain is amplified on the way to the outputs of the network, and so is the rounding of the network itself. Where
that is large, the outputs tell little about a single chain. Each chain then runs on the values that it gets in the network, and
its own output is compared.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fastentropy.fusion.chains.blocks import linear
from fastentropy.fusion.chains.finding import FoundChain
from fastentropy.fusion.inputs import Inputs, clone, is_float
from fastentropy.fusion.shared_tensors import SharedTensors
from fastentropy.fusion.tracing import AddedForms, ChainForms, add_forms, rewrite
from fastentropy.fusion.verification import (
    MOSTLY_ROUNDING,
    EquivalenceCheck,
    Judgement,
    full_precision,
    judge,
    relative_error,
)


class Rewritten(NamedTuple):
    """A network in which those chains are rewritten that do not change its outputs.

    Attributes:
        module: the network.
        left: the chains that were left as they were, and why.
        amplifies: whether the network amplifies rounding beyond the tolerance, so that chains were judged by themselves.
    """

    module: GraphModule
    left: dict[FoundChain, str]
    amplifies: bool


def rewrite_equal(
    traced: GraphModule,
    forms: ChainForms,
    sources: Mapping[Node, Tensor],
    check: EquivalenceCheck | None,
    known: SharedTensors | None = None,
) -> Rewritten:
    """Rewrite the chains of a graph, except those that change the outputs of the model.

    If the network with all chains rewritten is within the tolerance, they are all equal. Otherwise each chain is judged by
    itself, and those that hold are rewritten. If the network with these changes its outputs nevertheless, then chains are left
    out by bisection. If the outputs of the model are mostly rounding, they cannot tell whether the rest of the trace is right.
    The trace without any rewritten chain must then give the outputs of the model within the tolerance.

    Args:
        traced: the trace of the model.
        forms: the new form of each chain, as in `rewrite`.
        sources: an example of each chain's input, by its node.
        check: compares networks with the model. Without it, all chains are rewritten, unchecked.
        known: the constants of other graphs, which the network shares where it has equal ones.
    """
    known = known or SharedTensors()
    module, left = rewrite(traced, forms, sources, known), dict[FoundChain, str]()
    if not forms or check is None or (judgement := check.judge(module)).error <= check.tolerance:
        return Rewritten(module, left, amplifies=False)
    judgements = judge_chains(traced, forms, sources, check.smallest_inputs(), check.tolerance, known)
    for chain, own in judgements.items():
        if not own.holds:
            left[chain] = f"left as it was: its output differs by {own.error:.0e}, more than {own.bound}"
    if left:
        module = rewrite(traced, _without(forms, left), sources, known)
        judgement = check.judge(module)
    as_traced = check.judge(traced)
    if judgement.allowed > MOSTLY_ROUNDING and as_traced.error > check.tolerance:
        left |= dict.fromkeys(_without(forms, left), "left as it was: rounding decides the outputs of the model")
        return Rewritten(traced, left, amplifies=True)
    if judgement.holds or not as_traced.holds:
        return Rewritten(module, left, amplifies=True)
    wrong = _bisect(traced, _without(forms, left), sources, check, known)
    left |= dict.fromkeys(wrong, "left as it was: rewriting it changes the outputs of the model")
    return Rewritten(rewrite(traced, _without(forms, left), sources, known), left, amplifies=True)


def judge_chains(
    traced: GraphModule,
    forms: ChainForms,
    sources: Mapping[Node, Tensor],
    inputs: Iterable[Inputs],
    tolerance: float,
    known: SharedTensors | None = None,
) -> dict[FoundChain, Judgement]:
    """Judge a form of each chain of a graph by itself.

    In the graph, each chain runs as it is, in float64, and in its form, all on the same values: those that it gets in the
    network. The form is judged by its error against float64, and by that of the chain as it is.

    Args:
        traced: the graph.
        forms: the forms, as in `rewrite`.
        sources: an example of each chain's input, by its node.
        inputs: the inputs on which the graph runs.
        tolerance: the largest relative error that is always allowed.
        known: the constants of other graphs, which are read where a form has equal ones.

    Returns:
        The judgement on each chain, of its largest errors on all inputs.
    """
    added = add_forms(traced, forms, sources, known or SharedTensors())
    errors, own_errors = dict.fromkeys(forms, 0.0), dict.fromkeys(forms, 0.0)
    for each in inputs:
        comparison = _Comparison(added)
        with full_precision():
            comparison.run(*clone(each).leaves, enable_io_processing=False)
        for chain in forms:
            errors[chain] = max(errors[chain], comparison.errors.get(chain, torch.inf))
            own_errors[chain] = max(own_errors[chain], comparison.own_errors.get(chain, 0.0))
    return {chain: judge(errors[chain], own_errors[chain], tolerance) for chain in forms}


class _Comparison(Interpreter):
    """Runs a graph with added forms. Each chain runs a second time, in float64, on the values that it gets in the graph.

    Attributes:
        errors: the relative error of each form. A form that raises an exception has none.
        own_errors: the relative error of each chain as it is. A chain that does not run in float64 has none; its form is then
            compared with the chain as it is.
    """

    def __init__(self, added: AddedForms) -> None:
        """Take over a graph with added forms."""
        super().__init__(added.module)
        self.errors: dict[FoundChain, float] = {}
        self.own_errors: dict[FoundChain, float] = {}
        self._added = added
        self._chains = {member.name: chain for chain in added.results for member in chain.members}
        self._exact: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node; a node of a chain runs in float64 first. The output of a form is compared when it is complete."""
        if (chain := self._added.owners.get(n.name)) is not None:
            return self._run_added(n, chain)
        if (chain := self._chains.get(n.name)) is None:
            return super().run_node(n)
        self._run_exactly(n, chain)
        value = super().run_node(n)
        if n.name == chain.end.name:
            exact = self._exact.get(n.name)
            for member in chain.members:
                self._exact.pop(member.name, None)
            self._exact[n.name] = value if exact is None else exact
            self.own_errors[chain] = relative_error(value, self._exact[n.name])
            if self._added.results[chain].name not in self._added.owners:  # the form returns its input
                self.errors[chain] = relative_error(self.env[self._added.results[chain]], self._exact.pop(n.name))
        return value

    def _run_exactly(self, node: Node, chain: FoundChain) -> None:
        """Run a node of a chain in float64, if its operator can, and keep the value."""

        def exact(operand: Node) -> Any:
            if self._chains.get(operand.name) is chain:
                return self._exact[operand.name]
            value = self.env[operand]
            return value.to(torch.float64, copy=True) if is_float(value) else value

        with contextlib.suppress(Exception):  # whatever an operator raises in float64; what follows then has no operand
            assert callable(node.target)
            if node.target is torch.ops.aten.linear.default:  # the constant weight can be large, and is converted in blocks
                x: Any = map_arg(node.args[0], exact)
                constants: Any = map_arg(node.args[1:], self.env.__getitem__)
                self._exact[node.name] = linear(x, *constants)
            else:
                self._exact[node.name] = node.target(*map_arg(node.args, exact), **map_arg(node.kwargs, exact))

    def _run_added(self, node: Node, chain: FoundChain) -> Any:
        """Run a node of a form, and compare the output of the form. A form that raised an exception runs no further."""
        if chain.end.name not in self._exact:
            return None
        try:
            value = super().run_node(node)
        except Exception:  # such as a size that the form does not take
            del self._exact[chain.end.name]
            return None
        if node.name in self._added.last:
            result = self._added.results[chain]
            output = value if node is result else self.env[result]
            self.errors[chain] = relative_error(output, self._exact.pop(chain.end.name))
            self.env[result] = value = None
        return value


def _without(forms: ChainForms, left: Collection[FoundChain]) -> ChainForms:
    """Return the forms of those chains that are not left as they were."""
    return {chain: form for chain, form in forms.items() if chain not in left}


def _bisect(
    traced: GraphModule, forms: ChainForms, sources: Mapping[Node, Tensor], check: EquivalenceCheck, known: SharedTensors
) -> list[FoundChain]:
    """Return chains of which the network with all others rewritten holds, found by halving the chains that are tried at once.

    The arguments are as in `rewrite_equal`. The network with all chains rewritten is known not to hold.
    """
    held: set[FoundChain] = set()
    wrong: list[FoundChain] = []
    groups = [list(forms)]
    while groups:
        group = groups.pop()
        tried = held.union(group)
        if (
            len(tried) < len(forms)
            and check.judge(rewrite(traced, {c: f for c, f in forms.items() if c in tried}, sources, known)).holds
        ):
            held = tried
        elif len(group) == 1:
            wrong += group
        else:
            groups += [group[len(group) // 2 :], group[: len(group) // 2]]
    return wrong
