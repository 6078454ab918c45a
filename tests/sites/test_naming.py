"""A call has the same name in every pass, whatever the pass leaves out."""

import pytest

from fastentropy.sites.naming import CallKey, CallNames, PassNames


def names_of(names, *keys):
    """Return the names of the calls of one pass."""
    given = PassNames()
    return [names.name(key, given) for key in keys]


def module(place, producer, path="act"):
    return CallKey(path, False, place, producer)


def function(place, producer, path="relu"):
    return CallKey(path, True, place, producer)


def test_names_are_numbered_in_call_order():
    keys = [module(1, "a"), module(2, "b"), module(1, "a", "other"), module(3, "c")]
    names = CallNames()
    assert names_of(names, *keys) == ["act", "act:1", "other", "act:2"]
    assert names_of(names, *keys) == ["act", "act:1", "other", "act:2"]


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_pass_that_leaves_a_call_out(left_out):
    keys, names = [module(1, producer) for producer in "abc"], CallNames()
    expected = names_of(names, *keys)
    del keys[left_out], expected[left_out]
    assert names_of(names, *keys) == expected


def test_pass_in_another_order():
    keys, names = [module(1, producer) for producer in "abc"], CallNames()
    expected = names_of(names, *keys)
    assert names_of(names, *reversed(keys)) == expected[::-1]


def test_equal_calls_are_told_apart_by_order():
    names = CallNames()
    assert names_of(names, *[module(1, "a")] * 3) == ["act", "act:1", "act:2"]
    assert names_of(names, *[module(1, "a")] * 4) == ["act", "act:1", "act:2", "act:3"]
    assert names_of(names, module(1, "a")) == ["act"]


def test_module_at_another_place_after_the_same_layer():
    names = CallNames()
    assert names_of(names, module("forward", "a")) == ["act"]
    assert names_of(names, module("encode", "a")) == ["act"]
    assert names_of(names, module("encode", "a"), module("forward", "a")) == ["act", "act:1"]


def test_function_at_another_place_is_another_call():
    names = CallNames()
    assert names_of(names, function(1, "a")) == ["relu"]
    assert names_of(names, function(2, "a")) == ["relu:1"]
    assert names_of(names, function(1, "a"), function(2, "a")) == ["relu", "relu:1"]


def test_call_of_which_the_layer_before_is_not_known():
    names = CallNames()
    assert names_of(names, module(1, "a"), module(2, "b")) == ["act", "act:1"]
    assert names_of(names, module(2, None)) == ["act:1"]
    assert names_of(names, module(7, None)) == ["act"]
    assert names_of(names, function(1, None), function(2, None)) == ["relu", "relu:1"]
    assert names_of(names, function(2, "a")) == ["relu:1"]


def test_no_name_is_given_twice_in_a_pass():
    names = CallNames()
    names_of(names, module(1, "a"), module(2, "a"))
    given = names_of(names, module(2, "a"), module(3, "a"), module(1, "a"), module(4, None), module(1, "a"))
    assert len(set(given)) == 5
