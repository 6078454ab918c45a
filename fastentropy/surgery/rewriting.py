"""Rewrite a method of one module so that it calls other modules of it: its syntax tree is changed and compiled."""

from __future__ import annotations

import ast
import inspect
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from executing import Source
from torch import nn


class CannotBeRewrittenError(Exception):
    """A call has to stay as it is."""


class Place(NamedTuple):
    """Where in its file a call is written: lines count from 1, columns from 0 in bytes of UTF-8."""

    line: int
    end_line: int | None
    column: int
    end_column: int | None

    @classmethod
    def of(cls, frame: FrameType) -> Place | None:
        """Return the place of the call that a frame is making; None where that call cannot be identified."""
        node = Source.executing(frame).node
        return cls.at(node) if isinstance(node, ast.Call) else None

    @classmethod
    def at(cls, call: ast.Call) -> Place:
        """Return the place of a call in a syntax tree of the file."""
        return cls(call.lineno, call.end_lineno, call.col_offset, call.end_col_offset)


class Arguments(NamedTuple):
    """The arguments of a call of an activation, as expressions."""

    input: ast.expr
    positional: Sequence[ast.expr]
    keywords: Sequence[ast.keyword]

    def constants(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments after the input as values: the positional ones, and the others by name."""
        try:
            values = [ast.literal_eval(argument) for argument in self.positional]
            return values, {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in self.keywords}
        except ValueError:
            raise CannotBeRewrittenError from None


class MethodRewriter:
    """Rewrites the method of a module's class that has some code.

    Attributes:
        names: the names of the method in the class.
        changed: a call has been replaced.
    """

    def __init__(self, module: nn.Module, code: CodeType) -> None:
        """Read the source of the method.

        Raises:
            CannotBeRewrittenError: the code is not a method of the module's class, or it has no source.
        """
        self._module = module
        self.names, self._function, self._decorated = _method(type(module), code)
        self.changed = False
        try:
            lines = inspect.getsource(self._function)
            # Inside a block the source keeps its indentation, so that columns are those of the file.
            block = ast.parse("if True:\n" + lines if lines[0].isspace() else "\n" + lines)
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):
            raise CannotBeRewrittenError from None
        definition = block.body[0].body[0] if isinstance(block.body[0], ast.If) else block.body[0]
        if not isinstance(definition, ast.FunctionDef) or _has_mangled_names(definition):
            raise CannotBeRewrittenError
        self._definition = ast.increment_lineno(definition, code.co_firstlineno - 2)

    def find(self, place: Place | None) -> ast.Call:
        """Return the call at a place."""
        calls = [node for node in ast.walk(self._definition) if isinstance(node, ast.Call) and Place.at(node) == place]
        if len(calls) != 1:
            raise CannotBeRewrittenError
        return calls[0]

    def arguments(self, call: ast.Call) -> Arguments:
        """Return the input and the further arguments of a call of a function, a module or a method of a tensor."""
        positional, keywords = list(call.args), list(call.keywords)
        if any(isinstance(argument, ast.Starred) for argument in positional) or any(
            keyword.arg is None for keyword in keywords
        ):
            raise CannotBeRewrittenError
        if isinstance(call.func, ast.Attribute) and self.value(call.func) is None:
            return Arguments(call.func.value, positional, keywords)
        if positional:
            return Arguments(positional[0], positional[1:], keywords)
        given = [keyword for keyword in keywords if keyword.arg == "input"]
        if not given:
            raise CannotBeRewrittenError
        return Arguments(given[0].value, [], [keyword for keyword in keywords if keyword is not given[0]])

    def own_function(self, call: ast.Call) -> str | None:
        """Return the attribute of the module itself that holds the called function; None where it is held elsewhere."""
        func = call.func
        if not isinstance(func, ast.Attribute) or not self._is_self(func.value):
            return None
        return func.attr if func.attr in vars(self._module) else None

    def replace(self, call: ast.Call, attribute: str, argument: ast.expr) -> None:
        """Turn a call into the call of a module that is an attribute of this one."""
        receiver = ast.Name(self._function.__code__.co_varnames[0], ast.Load())
        call.func = ast.copy_location(ast.Attribute(receiver, attribute, ast.Load()), call.func)
        call.args, call.keywords = [argument], []
        self.changed = True

    def compile(self) -> Any:
        """Return the rewritten method, with the original's decorators, globals, closure and defaults."""
        function, definition = self._function, self._definition
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        code = self._compiled_definition(cells)
        if not set(code.co_freevars) <= set(cells):
            raise CannotBeRewrittenError
        closure = tuple(cells[name] for name in code.co_freevars)
        method: Any = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
            setattr(method, name, getattr(function, name))
        vars(method).update(vars(function))
        for decorator in reversed(definition.decorator_list if self._decorated else []):
            expression = compile(ast.Expression(decorator), function.__code__.co_filename, "eval")
            try:
                method = eval(expression, function.__globals__, inspect.getclosurevars(function).nonlocals)(method)
            except Exception as error:  # a decorator may ask for anything
                raise CannotBeRewrittenError from error
        return method

    def _compiled_definition(self, cells: Iterable[str]) -> CodeType:
        """Return the code of the definition alone, compiled inside a function that has the names of its closure."""
        definition = self._definition
        definition.returns = None
        for argument in (*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs):
            argument.annotation = None
        definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
        definition.args.kw_defaults = [default and ast.Constant(None) for default in definition.args.kw_defaults]
        factory = ast.parse(f"def factory({', '.join(cells)}):\n    pass")
        # The statement that was parsed is a function.
        factory.body[0].body = [definition]  # type: ignore[attr-defined]
        compiled = compile(ast.fix_missing_locations(factory), self._function.__code__.co_filename, "exec")
        (outer,) = (constant for constant in compiled.co_consts if isinstance(constant, CodeType))
        codes = [constant for constant in outer.co_consts if isinstance(constant, CodeType)]
        return next(code for code in codes if code.co_name == definition.name)

    def value(self, expression: ast.expr) -> Any:
        """Return the value of a name, an attribute or an item where it is known before the method runs; else None."""
        if isinstance(expression, ast.Name):
            return self._names().get(expression.id)
        if isinstance(expression, ast.Attribute):
            owner = self.value(expression.value)
            return None if owner is None else getattr(owner, expression.attr, None)
        if isinstance(expression, ast.Subscript) and isinstance(expression.slice, ast.Constant):
            owner = self.value(expression.value)
            item: Any = expression.slice.value
            return owner[item] if isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.Sequential) else None
        return None

    def _names(self) -> Mapping[str, Any]:
        function = self._function
        local = dict.fromkeys(function.__code__.co_varnames)
        try:
            closure = inspect.getclosurevars(function).nonlocals
        except ValueError:  # a cell that is still empty
            raise CannotBeRewrittenError from None
        return {**function.__globals__, **closure, **local, function.__code__.co_varnames[0]: self._module}

    def _is_self(self, expression: ast.expr) -> bool:
        return isinstance(expression, ast.Name) and expression.id == self._function.__code__.co_varnames[0]


def _method(kind: type, code: CodeType) -> tuple[list[str], FunctionType, bool]:
    """Return the names of a class's method with this code, its function without decorators, and whether it is decorated."""
    methods = {name: inspect.getattr_static(kind, name) for ancestor in kind.__mro__ for name in vars(ancestor)}
    found = {name: value for name, value in methods.items() if getattr(_undecorated(value), "__code__", None) is code}
    if not found or len(set(found.values())) > 1:
        raise CannotBeRewrittenError
    value = next(iter(found.values()))
    function = _undecorated(value)
    assert isinstance(function, FunctionType)
    return list(found), function, function is not value


def _undecorated(value: Any) -> Any:
    is_method = callable(value) and not isinstance(value, staticmethod)
    return inspect.unwrap(value) if is_method else None


def _has_mangled_names(definition: ast.FunctionDef) -> bool:
    """Return whether a name is mangled in a class: `__name` there means another name than outside."""
    nodes = list(ast.walk(definition))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.arg or "" for node in nodes if isinstance(node, ast.arg | ast.keyword)]
    return any(name.startswith("__") and not name.endswith("__") for name in names)
