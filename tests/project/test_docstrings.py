"""The docstrings of public names are complete, and their examples run."""

import doctest
import importlib
import inspect
import re

import pytest

import fastentropy
import fastentropy_kernels

#: The first line of a section of a Google-style docstring.
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Examples):$", re.MULTILINE)


def public_objects():
    """Yield every public function and class of both packages, and the public methods of the classes, by name."""
    for package in (fastentropy, fastentropy_kernels):
        for name in package.__all__:
            value = getattr(package, name)
            if not callable(value):
                continue
            yield f"{package.__name__}.{name}", value
            for attribute, member in vars(value).items() if inspect.isclass(value) else ():
                if not attribute.startswith("_") and callable(getattr(value, attribute)):
                    yield f"{package.__name__}.{name}.{attribute}", getattr(value, attribute, member)


OBJECTS = dict(public_objects())
FUNCTIONS = [name for name in OBJECTS if not inspect.isclass(OBJECTS[name])]
TOP_LEVEL = [name for name in OBJECTS if name.count(".") == 1]
#: The modules whose examples run, also those of methods: all that define a public name, and the documented ones of fusion.
DOCUMENTED = ("chains.finding", "chains.lowering", "latency.profiler", "latency.table", "projection")
MODULES = sorted({OBJECTS[name].__module__ for name in TOP_LEVEL} | {f"fastentropy.fusion.{module}" for module in DOCUMENTED})
EXAMPLES = {
    example.name: example
    for module in MODULES
    for example in doctest.DocTestFinder().find(importlib.import_module(module), globs={})
    if example.examples
}


def sections(value):
    """Return the text of each section of a docstring. "Summary" is the text before the first section."""
    parts = ["Summary", *SECTION.split(inspect.getdoc(value) or "")[:1], *SECTION.split(inspect.getdoc(value) or "")[1:]]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def parameters_of(value):
    return [name for name in inspect.signature(value).parameters if name != "self"]


@pytest.mark.parametrize("name", OBJECTS)
def test_summary_is_one_line(name):
    summary, *rest = sections(OBJECTS[name])["Summary"].splitlines()
    assert summary.endswith(".")
    assert not rest or not rest[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_described(name):
    parameters = parameters_of(OBJECTS[name])
    described = re.findall(r"^    \*{0,2}(\w+)(?: \(.*\))?:", sections(OBJECTS[name]).get("Args", ""), re.MULTILINE)
    assert described == parameters


@pytest.mark.parametrize("name", FUNCTIONS)
def test_result_is_described(name):
    returned = inspect.signature(OBJECTS[name]).return_annotation
    assert ("Returns" in sections(OBJECTS[name])) == (returned not in (None, "None"))


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_public_name_has_an_example(name):
    assert f"{OBJECTS[name].__module__}.{OBJECTS[name].__qualname__}" in EXAMPLES


@pytest.mark.parametrize("module", MODULES)
def test_module_has_an_example(module):
    assert any(name.startswith(f"{module}.") for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    outcome = runner.run(EXAMPLES[name], out=printed.append, clear_globs=False)
    assert outcome.failed == 0, "".join(printed)


def test_sections_are_read():
    def function(a, *, b):
        """Do a thing.

        Args:
            a: one.
            b: two.
        """

    assert sections(function) == {"Summary": "Do a thing.\n\n", "Args": "\n    a: one.\n    b: two."}
