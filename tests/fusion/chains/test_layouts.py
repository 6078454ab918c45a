"""A layout follows reshapes and permutations, and the view that it gives makes the same value from the natural one."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastentropy.fusion.chains.layouts import (
    Part,
    append_view,
    natural_layout,
    permuted,
    reshaped,
    same_layout,
    view_to,
)
from fastentropy.fusion.chains.nodes import product, quotient, same_size, shape_of


def factorisations(size):
    """Return the shapes of up to three axes with `size` values."""
    return [
        shape
        for length in (1, 2, 3)
        for shape in itertools.product(range(1, size + 1), repeat=length)
        if math.prod(shape) == size
    ]


@st.composite
def views(draw):
    """Draw a natural shape, and a sequence of reshapes (tuples) and permutations (lists) of its value."""
    natural = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    shape, moves = natural, []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(shape))))
            shape, move = tuple(shape[axis] for axis in order), list(order)
        else:
            start = draw(st.integers(0, len(shape) - 1))
            stop = draw(st.integers(start + 1, len(shape)))
            split = draw(st.sampled_from(factorisations(math.prod(shape[start:stop]))))
            shape = move = (*shape[:start], *split, *shape[stop:])
        moves.append(move)
    return natural, moves


def applied(natural, moves):
    """Return a natural value whose entries are their own positions, its view, and the layout of the view."""
    value = torch.arange(math.prod(natural)).reshape(natural)
    view, layout = value, natural_layout(natural)
    for move in moves:
        view = view.permute(move) if isinstance(move, list) else view.reshape(move)
        layout = layout and (permuted(layout, move) if isinstance(move, list) else reshaped(layout, move))
    return value, view, layout


def computed(view, value):
    """Return a view of a value, as the nodes that `append_view` makes compute it."""
    if view is None:
        return value
    graph = torch.fx.Graph()
    graph.output(append_view(graph, view, graph.placeholder("value"), value.shape))
    return torch.fx.GraphModule({}, graph)(value)


@settings(max_examples=50)
@given(views())
def test_the_view_of_a_layout_is_the_value(drawn):
    natural, moves = drawn
    value, expected, layout = applied(natural, moves)
    if layout is not None:
        assert torch.equal(computed(view_to(layout, natural, expected.shape), value), expected)


@settings(max_examples=60)
@given(views())
def test_equal_layouts_are_equal_values(drawn):
    """A view is recognised as the natural value exactly where its values are in the natural order and on the same axes."""
    natural, moves = drawn
    value, view, layout = applied(natural, moves)
    if layout is not None and view.shape == value.shape:
        assert same_layout(layout, natural_layout(natural)) == torch.equal(view, value)
        assert (view_to(layout, natural, view.shape) is None) == torch.equal(view, value)


@pytest.mark.parametrize(
    ("natural", "moves", "expected"),
    [
        ((2, 3, 4, 5), [(2, 3, 20)], ((Part(0, 2),), (Part(1, 3),), (Part(2, 4), Part(3, 5)))),
        ((2, 3, 4, 5), [(2, 3, 20), (2, 3, 4, 5)], natural_layout((2, 3, 4, 5))),
        ((6, 4), [(2, 3, 4)], ((Part(0, 2, 3),), (Part(0, 3, 1),), (Part(1, 4),))),
        ((6, 4), [(2, 3, 4), (6, 4)], natural_layout((6, 4))),
        ((2, 3, 1, 1), [(2, 3)], ((Part(0, 2),), (Part(1, 3),))),
        ((2, 3), [(3, 2)], None),
    ],
)
def test_layouts_of_common_views(natural, moves, expected):
    assert applied(natural, moves)[2] == expected


def free_shapes():
    """Return the shapes of an input `[batch, 4, height, 6]` with free sizes, and of two of its views."""

    class Views(nn.Module):
        def forward(self, x):
            return x.flatten(0, 1), x.flatten(2)

    dynamic = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)
    module = torch.export.export(Views(), (torch.randn(3, 4, 5, 6),), dynamic_shapes=dynamic).module(check_guards=False)
    return [shape_of(node) for node in module.graph.nodes if shape_of(node)]


def test_free_sizes_are_compared_as_symbols():
    natural, stacked, tokens = free_shapes()
    assert same_size(product(natural[:2]), stacked[0])
    assert not same_size(natural[0], natural[2])
    assert quotient(stacked[0], 4) is not None
    assert quotient(stacked[0], natural[0]) == 4
    assert quotient(natural[0], 4) is None
    assert same_size(quotient(tokens[2], natural[2]), 6)


def test_layouts_with_free_sizes():
    natural, stacked, tokens = free_shapes()
    layout = natural_layout(natural)
    for shape in (stacked, tokens):
        there = reshaped(layout, shape)
        assert same_layout(reshaped(there, natural), layout)
        assert view_to(layout, natural, natural) is None
    value = torch.randn(2, 4, 7, 6)  # of other sizes than the trace
    view = view_to(permuted(reshaped(layout, tokens), [0, 2, 1]), natural, (tokens[0], tokens[2], 4))
    graph = torch.fx.Graph()
    graph.output(append_view(graph, view, graph.placeholder("value"), natural))
    assert torch.equal(torch.fx.GraphModule({}, graph)(value), value.flatten(2).transpose(1, 2))


def test_sizes_that_a_graph_cannot_compute_are_refused():
    natural, _, _ = free_shapes()
    both = (product((natural[0], natural[2])), 24)
    halves = (natural[0] * 2, natural[2] * 2, 6)
    assert view_to(natural_layout(natural), natural, both) is not None
    with pytest.raises(ValueError, match="more than one size"):
        view_to(natural_layout(natural), natural, halves)
