"""Which values are counted: those of nested tensors exactly, and of tensors without neurons none, with a note."""

import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fastentropy.collector.counting import PassCounting
from fastentropy.collector.values import plain_parts
from fastentropy.sites.padding import TokenAxes
from fastentropy.sites.site import Call, Site
from tests._helpers.counts import plain_counts
from tests._helpers.modes import RecordsOperators
from tests._helpers.tensors import assert_same


def count(x, axis, neurons, act=None, is_token=None, token_axes=None):
    """What `PassCounting` makes of one call: the output, the statistics of the site (None if it never ran), and the notes."""
    act, notes, site = act or nn.ReLU(), [], Site("act", "relu", neurons, axis)
    counting = PassCounting(nn.Identity(), per_batch=False, after_pass=lambda: None, note=notes.append)
    counters = counting.begin_pass()
    call = Call(site, x, is_token, act, "", lambda: act(x), token_axes)
    y = counting.run_activation(counters, call)
    counting.end_pass(counters, completed=True)
    return y, counting.statistics({"act": site}).get("act"), notes


def jagged(sizes, *shape):
    return torch.nested.nested_tensor([torch.randn(size, *shape) for size in sizes], layout=torch.jagged)


def with_holes(*shape):
    values, starts, sizes = torch.randn(23, *shape), torch.tensor([0, 5, 11, 23]), torch.tensor([2, 6, 1])
    return torch.nested.nested_tensor_from_jagged(values, offsets=starts, lengths=sizes)


NESTED = {
    "jagged": (lambda: jagged([2, 5, 0, 37], 7), 2),
    "jagged with heads": (lambda: jagged([3, 1], 2, 7), 3),
    "jagged, heads as neurons": (lambda: jagged([3, 1], 7, 2), 2),
    "jagged and transposed": (lambda: jagged([2, 5, 9], 7).transpose(1, 2), 1),
    "jagged with holes": (lambda: with_holes(7), 2),
    "one component": (lambda: jagged([1023], 7), 2),
    "strided": (lambda: torch.nested.nested_tensor([torch.randn(size, 7) for size in (2, 5, 1)]), 2),
    "strided images": (lambda: torch.nested.nested_tensor([torch.randn(7, 2, 3), torch.randn(7, 4, 1)]), 1),
    "strided of one size": (lambda: torch.nested.nested_tensor([torch.randn(4, 7)] * 3), 2),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("case", NESTED)
def test_nested_tensors_are_counted_by_component(case, act, mode):
    make, axis = NESTED[case]
    with mode():
        x = make()
        y, site, notes = count(x, axis, 7, act)
    components = x.unbind()
    assert torch.equal(site.counts, sum(plain_counts(part, axis - 1) for part in components))
    assert (site.nan, notes) == (0, [])
    assert_same([part.detach() for part in y.unbind()], [part.detach() for part in act(x).unbind()])


def test_nan_in_nested_tensors():
    x = jagged([2, 3], 4)
    x.values()[0, 1] = torch.nan
    assert count(x, 2, 4)[1].nan == 1


def test_nested_values_of_one_neuron():
    x = jagged([2, 3], 4)
    assert torch.equal(count(x, None, 1)[1].counts, plain_counts(x.values().reshape(-1, 1), 1))


def test_padding_of_dense_batches_is_not_that_of_nested_ones():
    x, is_token = jagged([2, 3], 4), torch.tensor([[True, True, False], [True, True, True]])
    assert count(x, 2, 4, is_token=is_token, token_axes=TokenAxes(0, 1))[1].observations == 5 * 4


UNCOUNTABLE = {
    "COO": (lambda: torch.randn(4, 6).to_sparse(), 1, "a sparse_coo tensor"),
    "CSR": (lambda: torch.randn(4, 6).to_sparse_csr(), 1, "a sparse_csr tensor"),
    "BSR": (lambda: torch.randn(4, 6).to_sparse_bsr((2, 2)), 1, "a sparse_bsr tensor"),
    "hybrid COO": (lambda: torch.randn(4, 6).to_sparse(1), 1, "a sparse_coo tensor"),
    "neurons of varying number": (lambda: jagged([6, 3], 2), 1, "a nested tensor whose channel axis has no fixed size"),
    "neurons of varying number, strided": (
        lambda: torch.nested.nested_tensor([torch.randn(6, 2), torch.randn(3, 2)]),
        1,
        "a nested tensor whose channel axis has no fixed size",
    ),
    "a batch as neurons": (lambda: jagged([6] * 6, 2), 0, "a nested tensor whose channel axis has no fixed size"),
}


@pytest.mark.parametrize("case", UNCOUNTABLE)
def test_values_that_cannot_be_counted_are_noted(case):
    make, axis, what = UNCOUNTABLE[case]
    x = make()
    y, site, notes = count(x, axis, 6)
    assert notes == [f"site 'act' was not counted in some calls: its input is {what}"]
    assert site is None
    assert y.layout == x.layout


class Refuses(torch.Tensor):
    """A tensor that knows relu and nothing else, as tensors of other libraries do."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_of_it = data

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.relu.default:
            return args[0].data_of_it.relu()
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} is unknown here")


def test_tensors_of_other_libraries_are_noted():
    y, site, notes = count(Refuses(torch.tensor([[-1.0, 2.0]])), 1, 2)
    assert y.tolist() == [[0, 2]]
    assert notes == ["site 'act' was not counted in some calls: its input is a Refuses"]
    assert site.observations == site.nan == 0


def test_mkldnn_tensors_are_counted():
    dense = torch.randn(4, 6)
    y, site, notes = count(dense.to_mkldnn(), 1, 6)
    assert torch.equal(site.counts, plain_counts(dense, 1))
    assert notes == []
    assert_same(y.to_dense(), dense.relu())


def test_tensors_without_values_are_neither_counted_nor_noted():
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(4, 6))
        y, site, notes = count(fake, 1, 6)
    assert (type(y), site, notes) == (type(fake), None, [])
    y, site, notes = count(torch.randn(4, 6, device="meta"), 1, 6)
    assert (y.device.type, site, notes) == ("meta", None, [])
    seen = []
    torch.func.functionalize(lambda x: seen.append(count(x, 1, 6)[1:]) or x)(torch.randn(4, 6))
    assert seen == [(None, [])]


@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (2, 5, 3), (0, 3), (1, 1)])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU()], ids=str)
def test_sites_of_one_neuron_count_all_values(shape, act):
    x = torch.randn(shape)
    expected, before = act(x.clone()), x.clone()
    with torch.no_grad():
        y, site, notes = count(x, None, 1, act)
    assert torch.equal(site.counts, plain_counts(before.reshape(-1, 1), 1))
    assert (site.nan, notes) == (0, [])
    assert_same(y, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_padding_of_a_site_of_one_neuron_is_not_counted(merged):
    is_token = torch.rand(5, 7) < 0.6
    x = torch.randn(35 if merged else (5, 7))
    axes = TokenAxes(0, 0) if merged else TokenAxes(0, 1)
    site = count(x, None, 1, is_token=is_token, token_axes=axes)[1]
    assert torch.equal(site.counts, plain_counts(x[is_token.view(x.shape)][:, None], 1))
    assert site.nan == 0


class Asked(torch.Tensor):
    """A tensor that records which functions are called with it."""

    asked: typing.ClassVar = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("function", [F.relu, F.gelu])
def test_subclasses_see_only_the_activation(function):
    x = torch.randn(4, 6)
    asked = x.as_subclass(Asked)
    function(asked)
    expected = list(Asked.asked)
    Asked.asked.clear()
    y, site, _ = count(asked, 1, 6, function)
    assert Asked.asked == expected
    assert type(y) is Asked
    assert torch.equal(site.counts, plain_counts(x, 1))
    Asked.asked.clear()


class Records(TorchFunctionMode):
    """A mode that records which functions are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Records, RecordsOperators])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.ReLU(inplace=True)], ids=str)
def test_modes_see_only_the_activation(act, mode):
    x = torch.randn(4, 6)
    first, second = x.clone(), x.clone()
    with mode() as without:
        act(first)
    with mode() as during:
        site = count(second, 1, 6, act)[1]
    assert during.seen == without.seen
    assert torch.equal(site.counts, plain_counts(x, 1))


def test_parts_have_the_memory_of_the_tensor():
    x = jagged([2, 5], 4)
    [(part, axis)] = plain_parts(x, 2)
    assert (part.data_ptr(), axis) == (x.values().data_ptr(), 1)
    [(part, axis)] = plain_parts(x.values(), 0)
    assert (part.data_ptr(), axis) == (x.values().data_ptr(), 0)
