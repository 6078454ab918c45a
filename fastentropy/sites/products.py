"""Find the calls of activations that are multiplied by what a linear layer returns, as in the gated MLP of a language model.

Such a call reads `self.act_fn(…) * self.up_proj(x)`. Nothing but the product uses what the activation returns, and nothing but
a linear layer of PyTorch runs before the product. So both can be computed at once, and nobody can see it.
"""

import dis
import inspect
import sys
from types import CodeType
from typing import NamedTuple

import torch.nn.functional as F
from torch import nn

from fastentropy._compat import children_of, compiled_call, parameters_of, runs_only_forward

#: Instructions that compute nothing.
_SKIPPED = frozenset({"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL", "RESUME"})
_LOADS = frozenset({"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK"})
_CALLS = frozenset({"CALL", "CALL_METHOD"})

#: What a product relies on, as it was before anybody could replace it.
_MODULE_CALL, _LINEAR_FORWARD, _LINEAR = nn.Module.__call__, nn.Linear.forward, F.linear


class Product(NamedTuple):
    """The names of the attributes in `self.activation(…) * self.linear(…)`."""

    activation: str
    linear: str


def product_at(code: CodeType, place: int) -> Product | None:
    """Return the product of which the call at a place in some code is the first factor; None if there is none.

    The instructions decide, not the source, which may have changed since. They must be those of `self.a(v) * self.b(w)` or of
    `self.a(self.c(v)) * self.b(w)`, where v and w are local variables, and `self` is always what the code was called with.
    """
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR) or not code.co_argcount:
        return None
    instructions = [each for each in dis.get_instructions(code) if each.opname not in _SKIPPED]
    if any(_stores(each, code.co_varnames[0]) for each in instructions):
        return None
    calls = [index for index, each in enumerate(instructions) if each.offset == place]
    if not calls or not _is_call(instructions[calls[0]]):
        return None
    before, after = instructions[: calls[0]], instructions[calls[0] + 1 : calls[0] + 6]
    argument = 1 if before and before[-1].opname in _LOADS else 4
    activation = _method(code, before[-argument - 2 : -argument])
    is_argument = argument == 1 or (_method(code, before[-4:-2]) and before[-2].opname in _LOADS and _is_call(before[-1]))
    linear = _method(code, after[:2])
    is_product = len(after) == 5 and after[2].opname in _LOADS and _is_call(after[3]) and _is_multiplication(after[4])
    return Product(activation, linear) if activation and is_argument and linear and is_product else None


def is_plain(product: Product, code: CodeType, owner: nn.Module, module: nn.Module) -> bool:
    """Return whether a product is what it seems: nobody has replaced what is called, and no hook, wrapper or tracer looks on.

    Args:
        product: the product.
        code: the code that computes it.
        owner: the module whose forward is running.
        module: the activation module.
    """
    kind, children = type(owner), children_of(owner)
    linear = children.get(product.linear)
    return (
        getattr(kind.forward, "__code__", None) is code
        and children.get(product.activation) is module
        and type(linear) is nn.Linear
        and not any(name in vars(owner) for name in product)
        and _reads_children(kind, *product)
        and type(module).__call__ is nn.Linear.__call__ is _MODULE_CALL
        and nn.Linear.forward is _LINEAR_FORWARD
        and F.linear is _LINEAR
        and "forward" not in vars(linear)
        and compiled_call(linear) is None
        and runs_only_forward(linear)
        and all(type(parameter) in (nn.Parameter, type(None)) for parameter in parameters_of(linear).values())
        and sys.gettrace() is None
        and sys.getprofile() is None
        and not _is_monitored()
    )


def _stores(instruction: dis.Instruction, name: str) -> bool:
    """Return whether an instruction gives a local variable a value. Some store two variables, or load another one as well."""
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return "STORE_FAST" in instruction.opname and name in names


def _method(code: CodeType, instructions: list[dis.Instruction]) -> str | None:
    """Return the name if two instructions load `self.name` to call it, where `self` is the first argument; otherwise None."""
    if len(instructions) != 2:
        return None
    owner, name = instructions
    loads_method = name.opname == "LOAD_METHOD" or (
        sys.version_info >= (3, 12) and name.opname == "LOAD_ATTR" and bool((name.arg or 0) & 1)
    )
    is_own = owner.opname in _LOADS and owner.argval == code.co_varnames[0]
    return str(name.argval) if loads_method and is_own else None


def _is_call(instruction: dis.Instruction) -> bool:
    """Return whether an instruction calls something with one positional argument."""
    return instruction.opname in _CALLS and instruction.arg == 1


def _is_multiplication(instruction: dis.Instruction) -> bool:
    """Return whether an instruction computes `a * b`, not in place."""
    return instruction.opname == "BINARY_MULTIPLY" or (instruction.opname == "BINARY_OP" and instruction.argrepr == "*")


def _is_monitored() -> bool:
    """Return whether a tool uses `sys.monitoring` (of Python 3.12), which may be shown what functions return."""
    return sys.version_info >= (3, 12) and any(sys.monitoring.get_tool(tool) for tool in range(6))


def _reads_children(kind: type[nn.Module], *names: str) -> bool:
    """Return whether attributes of modules of a class are read from their children: the class has none of these names."""
    plain = kind.__getattr__ is nn.Module.__getattr__ and kind.__getattribute__ is object.__getattribute__
    return plain and not any(hasattr(kind, name) for name in names)
