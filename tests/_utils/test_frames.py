"""Variables of running functions are read, and nothing else changes for the functions."""

import inspect
import sys
import weakref

from fastentropy._utils.frames import local_variable


class Value:
    """Something that can be referred to weakly."""


def test_values_are_not_kept():
    first, second = Value(), Value()
    alive = weakref.ref(second)
    assert local_variable(inspect.currentframe(), "first") is first
    second = None
    assert alive() is None
    assert local_variable(inspect.currentframe(), "second") is None
    assert local_variable(inspect.currentframe(), "third") is None
    assert {"alive", "first", "second"} <= locals().keys()


def test_variables_that_somebody_reads_stay():
    first = Value()
    variables = locals()
    assert local_variable(inspect.currentframe(), "first") is first
    assert variables["first"] is first


def test_traced_functions_keep_their_variables():
    """As under a debugger, in which the user calls a model."""
    read = []

    def traced():
        first = Value()
        return first

    def trace(frame, event, argument):
        if event == "line":
            read.append(local_variable(frame, "first"))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = traced()
    finally:
        sys.settrace(before)
    assert isinstance(result, Value)
    assert read == [None, result]
