"""Rewrite a method of one module so that it calls other modules of it: on the method's syntax tree, from its source."""

from __future__ import annotations

import ast
import inspect
import sys
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from torch import nn


class CannotBeRewrittenError(Exception):
    """A call has to stay as it is."""


class Place(NamedTuple):
    """Where in a file a call stands. The columns are known from Python 3.11 on."""

    line: int
    end_line: int | None = None
    column: int | None = None
    end_column: int | None = None

    @classmethod
    def of(cls, frame: FrameType) -> Place:
        """The place of the call that a frame is making."""
        if sys.version_info < (3, 11):
            return cls(frame.f_lineno)
        return cls(*list(frame.f_code.co_positions())[frame.f_lasti // 2])


class Arguments(NamedTuple):
    """What a call gives to an activation."""

    input: ast.expr
    positional: Sequence[ast.expr]
    keywords: Sequence[ast.keyword]

    def constants(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments behind the input as values."""
        try:
            values = [ast.literal_eval(argument) for argument in self.positional]
            return values, {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in self.keywords}
        except ValueError:
            raise CannotBeRewrittenError from None


class MethodRewriter:
    """The method of a module's class that has some code."""

    def __init__(self, module: nn.Module, code: CodeType) -> None:
        """Raise CannotBeRewrittenError where the code is no method of the module's class, or has no source."""
        self._module = module
        self.names, self._function, self._decorated = _method(type(module), code)
        self.changed = False
        try:
            lines = inspect.getsource(self._function)
            # Inside of a block the source keeps its indentation, so that columns are those of the file.
            block = ast.parse("if True:\n" + lines if lines[0].isspace() else "\n" + lines)
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):
            raise CannotBeRewrittenError from None
        definition = block.body[0].body[0] if isinstance(block.body[0], ast.If) else block.body[0]
        if not isinstance(definition, ast.FunctionDef) or _has_mangled_names(definition):
            raise CannotBeRewrittenError
        self._definition = ast.increment_lineno(definition, code.co_firstlineno - 2)

    def find(self, place: Place) -> ast.Call:
        """The call at a place; where columns are not known, the only one that the line has."""
        calls = [node for node in ast.walk(self._definition) if isinstance(node, ast.Call)]
        if place.column is None:
            found = [node for node in calls if node.lineno == place.line]
        else:
            found = [node for node in calls if (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == place]
        if len(found) != 1:
            raise CannotBeRewrittenError
        return found[0]

    def arguments(self, call: ast.Call) -> Arguments:
        """The input and the further arguments of a call of a function, a module or a method of a tensor."""
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
        """The attribute of the module itself that holds the function which is called, where it does."""
        func = call.func
        if not isinstance(func, ast.Attribute) or not self._is_self(func.value):
            return None
        return func.attr if func.attr in vars(self._module) else None

    def replace(self, call: ast.Call, attribute: str, argument: ast.expr) -> None:
        """Let a call be that of a module, an attribute of this one."""
        receiver = ast.Name(self._function.__code__.co_varnames[0], ast.Load())
        call.func = ast.copy_location(ast.Attribute(receiver, attribute, ast.Load()), call.func)
        call.args, call.keywords = [argument], []
        self.changed = True

    def compile(self) -> Any:
        """The rewritten method, with the original's decorators, globals, closure and defaults."""
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
        """The code of the definition alone, inside of a function that has the names of its closure."""
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
        """What a name, an attribute or an item stands for where that is known before the method runs; else None."""
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
        except ValueError:  # a cell that is empty still
            raise CannotBeRewrittenError from None
        return {**function.__globals__, **closure, **local, function.__code__.co_varnames[0]: self._module}

    def _is_self(self, expression: ast.expr) -> bool:
        return isinstance(expression, ast.Name) and expression.id == self._function.__code__.co_varnames[0]


def _method(kind: type, code: CodeType) -> tuple[list[str], FunctionType, bool]:
    """The names of the method of a class that has this code, its function without decorators, and whether it has some."""
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
    """Whether a name means another one inside of a class than outside."""
    nodes = list(ast.walk(definition))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.arg or "" for node in nodes if isinstance(node, ast.arg | ast.keyword)]
    return any(name.startswith("__") and not name.endswith("__") for name in names)
