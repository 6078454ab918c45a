"""Conditions on sizes are evaluated and never executed, and nothing is fused where they cannot be had."""

import pytest
import torch

from fastentropy import fuse
from fastentropy.fusion import api
from fastentropy.fusion.guards import Conditions, guards_of, holds
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import export

LEAVES = [torch.zeros(3, 8), 2.0, torch.zeros(4)]


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        ("leaf_0.size()[0] % 4 != 0", True),
        ("(1 + (((-1) + leaf_0.size()[1]) // 2)) == 4", True),
        ("2 <= leaf_0.size()[0] < 3", False),
        ("torch.sym_max(1, leaf_2.size()[0] // 8) * leaf_0.size()[1] > 8", False),
        ("not leaf_0.size()[0] == 3 or leaf_0.size()[1] == 8 and leaf_2.size()[0] == 4", True),
    ],
)
def test_arithmetic_and_comparisons(guard, expected):
    assert holds(guard, LEAVES) is expected


@pytest.mark.parametrize(
    "guard",
    [
        "__import__('os').getcwd()",
        "leaf_0.sum() > 0",
        "leaf_0.__class__",
        "leaf_9.size()[0] == 1",
        "leaf_1.size()[0] == 1",
        "leaf_0.size()[7] == 1",
        "leaf_0.size()[0] % 0",
        "[x for x in ()]",
        "a = 1",
        "'text'",
        "torch.load(1)",
        "2 ** 1000000000",
    ],
)
def test_other_expressions_are_refused(guard):
    with pytest.raises(ValueError, match="is not a condition on sizes"):
        holds(guard, LEAVES)


class Branches(torch.nn.Module):
    def forward(self, x, others):
        return x * 2 if x.shape[0] % 4 else x + others["y"]


def test_guards_name_the_inputs_in_flat_order():
    inputs = Inputs((torch.zeros(3, 5), {"y": torch.zeros(3, 5)}))
    program = export(Branches(), inputs)
    conditions = Conditions(TracedInputs.of(program), guards_of(program, Branches(), inputs))
    accepted = [n for n in range(2, 12) if not conditions.refusal([torch.zeros(n, 5), torch.zeros(n, 5)])]
    assert accepted == [2, 3, 5, 6, 7, 9, 10, 11]


def test_unreadable_guard_fixes_all_sizes_but_the_batch():
    inputs = Inputs((torch.zeros(3, 5), {"y": torch.zeros(3, 5)}))
    program = export(Branches(), inputs)
    program._guards_code = ["f(L['x'])"]
    assert guards_of(program, Branches(), inputs) == ("leaf_0.size()[1] == 5", "leaf_1.size()[1] == 5")


def test_nothing_is_fused_without_guards(monkeypatch):
    """A release of PyTorch that renames the guards must not be taken for a trace that holds at every size."""

    def export_without_guards(*arguments):
        program = export(*arguments)
        del program._guards_code
        return program

    monkeypatch.setattr(api, "export", export_without_guards)
    with pytest.raises(RuntimeError, match="_guards_code"):
        fuse(Branches().eval(), (torch.zeros(3, 5), {"y": torch.zeros(3, 5)}), measure=False)
