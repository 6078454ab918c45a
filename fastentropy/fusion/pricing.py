"""Price the forms of chains (stretches of linear operators): by measured times or by counted costs.

Forms of equal structure have one price. A network repeats its blocks, so most prices are known after the first block.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fastentropy._utils.timing import Key, measure_times
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import BorderCorrected, Chain, Element, FusedPair, Parallel, TapBiased, cost
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.selections import Selection

#: Returns the prices of forms on their inputs, which have the same keys.
Price: TypeAlias = Callable[[Mapping[Any, Chain], Mapping[Any, Tensor]], dict[Any, float]]

#: The number of multiplications that take as long as moving one byte to or from memory, in float32 on a server's CPU.
MULTIPLICATIONS_PER_BYTE = 10

#: The same number on a GPU. The tensor cores of an H100 do 70 in TF32 (PyTorch's default for convolutions), 150 in 16 bits.
MULTIPLICATIONS_PER_BYTE_ON_A_GPU = 100

#: The seconds after which no further round of a measurement begins.
BUDGET_SECONDS = 0.5


def measured(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Return the milliseconds of each form on the input with the same key; all are timed side by side.

    More than six forms are timed more coarsely.
    """
    gpu = next((x.device for x in inputs.values() if x.is_cuda), None)
    if len(forms) <= 6:
        return measure_times(calls(forms, inputs), graphs_on=gpu, budget_seconds=BUDGET_SECONDS)
    return measure_times(calls(forms, inputs), rounds=3, round_seconds=0.001, graphs_on=gpu)


def calls(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, Callable[[], Tensor]]:
    """Return, for each form, a function that runs the compiled form on the input with the same key."""
    return {key: functools.partial(compile_chain(form, inputs[key]), inputs[key]) for key, form in forms.items()}


def counted(forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
    """Return the counted cost of each form on the input with the same key, as an estimate of its time; see `counted_cost`."""
    return {key: counted_cost(form, inputs[key]) for key, form in forms.items()}


def counted_cost(form: Chain, x: Tensor) -> float:
    """Return the cost of a form on x: the number of multiplications, plus those that take as long as moving the bytes."""
    multiplications, moved = cost(form, x.shape, x.element_size())
    return multiplications + (MULTIPLICATIONS_PER_BYTE_ON_A_GPU if x.is_cuda else MULTIPLICATIONS_PER_BYTE) * moved


class SharedPrices:
    """Prices forms, and prices forms of equal structure once.

    Times are only comparable if they were measured side by side. The prices of several forms are therefore reused only if an
    earlier call had forms of all their structures.
    """

    def __init__(self, price: Price) -> None:
        """Take over the function that prices forms, such as `measured` or `counted`."""
        self._price = price
        self._known: list[dict[Hashable, float]] = []

    def __call__(self, forms: Mapping[Key, Chain], inputs: Mapping[Key, Tensor]) -> dict[Key, float]:
        """Return the price of each form on the input with the same key."""
        structures = {key: (structure(form), _layout(inputs[key])) for key, form in forms.items()}
        first: dict[Hashable, Key] = {}
        for key, each in structures.items():
            first.setdefault(each, key)
        known = next((prices for prices in self._known if first.keys() <= prices.keys()), None)
        if known is None:
            prices = self._price({key: forms[key] for key in first.values()}, {key: inputs[key] for key in first.values()})
            known = {each: prices[key] for each, key in first.items()}
            self._known.append(known)
        return {key: known[each] for key, each in structures.items()}


def structure(chain: Chain) -> Hashable:
    """Return what the operators of a compiled chain depend on: all about the chain but the values of its weights."""
    return tuple(map(_element_structure, chain))


def _element_structure(element: Element) -> Hashable:
    """Return what the operators of one element depend on; see `structure`."""
    match element:
        case Selection(weight=weight, axes=axes, groups=groups, target=target, arguments=arguments):
            values = tuple(each.shape if isinstance(each, Tensor) else repr(each) for each in arguments)
            return "selection", weight.shape, axes, groups, str(target), values
        case AffineOperator(weight=weight, bias=bias, axes=axes, groups=groups, border_bias=slabs):
            scale = weight.flatten()[:1] if element.is_channelwise else None
            is_number = scale is not None and bool((weight == scale).all())
            border = tuple((slab.axis, slab.positions, slab.values.shape) for slab in slabs)
            return weight.shape, axes, groups, bias.shape, bool(bias.any()), border, element.is_average, is_number
        case Parallel(branches):
            return type(element).__name__, tuple(map(structure, branches))
        case BorderCorrected(interior, chain, strips):
            return "corrected", _element_structure(interior), structure(chain), strips
        case TapBiased(operator):
            return "tap biased", _element_structure(operator)
        case FusedPair(name, first, second, adds_input):
            return name, _element_structure(first), _element_structure(second), adds_input
        case _:
            return element  # compared by identity


def _layout(x: Tensor) -> Hashable:
    """Return what the time of an operator on x depends on, besides the operator."""
    return x.shape, x.stride(), x.dtype, x.device
