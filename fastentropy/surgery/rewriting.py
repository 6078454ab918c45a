"""Rewrite a method of a module so that it calls attributes of the module instead of functions.

The syntax tree of the method is changed and compiled.
"""

from __future__ import annotations

import ast
import inspect
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from torch import nn


class CannotBeRewrittenError(Exception):
    """A call cannot be rewritten, so it stays as it is."""


class Place(NamedTuple):
    """The position of a call in its source file. Lines count from 1; columns count from 0, in bytes of UTF-8."""

    line: int
    end_line: int | None
    column: int
    end_column: int | None

    @classmethod
    def of(cls, frame: FrameType) -> Place | None:
        """Return the position of the call that a stack frame is making; None if this call cannot be identified."""
        from executing import Source  # only isolating needs it

        node = Source.executing(frame).node
        return cls.at(node) if isinstance(node, ast.Call) else None

    @classmethod
    def at(cls, call: ast.Call) -> Place:
        """Return the position of a call in the syntax tree of its file."""
        return cls(call.lineno, call.end_lineno, call.col_offset, call.end_col_offset)


class Arguments(NamedTuple):
    """The arguments of an activation call, as expressions of the syntax tree."""

    input: ast.expr
    positional: Sequence[ast.expr]  # the positional arguments after the input
    keywords: Sequence[ast.keyword]  # the keyword arguments other than the input

    def constants(self) -> tuple[list[Any], dict[str, Any]]:
        """Evaluate the arguments after the input.

        Returns:
            The values of the positional arguments, and those of the keyword arguments by name.

        Raises:
            CannotBeRewrittenError: an argument is not a constant.
        """
        try:
            values = [ast.literal_eval(argument) for argument in self.positional]
            return values, {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in self.keywords}
        except ValueError:
            raise CannotBeRewrittenError from None


class MethodRewriter:
    """Rewrite one method of a module, which is identified by its code object.

    Attributes:
        names: the names under which the class of the module has the method.
        changed: whether a call has been replaced.
    """

    def __init__(self, module: nn.Module, code: CodeType) -> None:
        """Read the source of the method.

        Args:
            module: the module.
            code: the code object of the method.

        Raises:
            CannotBeRewrittenError: the code is not a method of the module's class, its source cannot be read, or it uses names
                such as `__name`, which Python mangles.
        """
        self._module = module
        self.names, self._function, self._decorated = _method(type(module), code)
        self.changed = False
        try:
            lines = inspect.getsource(self._function)
            # In a block the source may keep its indentation. Then the columns are those of the file.
            block = ast.parse("if True:\n" + lines if lines[0].isspace() else "\n" + lines)
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):
            raise CannotBeRewrittenError from None
        definition = block.body[0].body[0] if isinstance(block.body[0], ast.If) else block.body[0]
        if not isinstance(definition, ast.FunctionDef) or _has_mangled_names(definition):
            raise CannotBeRewrittenError
        self._definition = ast.increment_lineno(definition, code.co_firstlineno - 2)

    def find(self, place: Place | None) -> ast.Call:
        """Return the call at a position in the method.

        Args:
            place: the position, or None if it is not known.

        Raises:
            CannotBeRewrittenError: there is no call at this position, or more than one.
        """
        calls = [node for node in ast.walk(self._definition) if isinstance(node, ast.Call) and Place.at(node) == place]
        if len(calls) != 1:
            raise CannotBeRewrittenError
        return calls[0]

    def arguments(self, call: ast.Call) -> Arguments:
        """Return the input and the further arguments of an activation call.

        The call may be one of a function, of a module, or of a method of a tensor. In the last case the tensor is the input.

        Raises:
            CannotBeRewrittenError: the call has no input, or it unpacks arguments with * or **.
        """
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
        """Return the attribute's name if the call is `self.<attribute>(…)` and the attribute is in the module's own __dict__.

        For any other call, return None.
        """
        func = call.func
        if not isinstance(func, ast.Attribute) or not self._is_self(func.value):
            return None
        return func.attr if func.attr in vars(self._module) else None

    def replace(self, call: ast.Call, attribute: str, argument: ast.expr) -> None:
        """Replace `call` by `self.<attribute>(argument)`, where `self` is the module whose method is rewritten."""
        receiver = ast.Name(self._function.__code__.co_varnames[0], ast.Load())
        call.func = ast.copy_location(ast.Attribute(receiver, attribute, ast.Load()), call.func)
        call.args, call.keywords = [argument], []
        self.changed = True

    def compile(self) -> Any:
        """Compile the rewritten method. It has the decorators, globals, closure and defaults of the original.

        Raises:
            CannotBeRewrittenError: the method refers to names that the original did not have, or a decorator raises.
        """
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
            except Exception as error:  # a decorator may raise anything
                raise CannotBeRewrittenError from error
        return method

    def _compiled_definition(self, cells: Iterable[str]) -> CodeType:
        """Return the code object of the rewritten method, without decorators, annotations and default values.

        The definition is compiled inside a function with the parameters `cells`, so that these names become closure variables.
        """
        definition = self._definition
        definition.returns = None
        for argument in (*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs):
            argument.annotation = None
        definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
        definition.args.kw_defaults = [default and ast.Constant(None) for default in definition.args.kw_defaults]
        factory = ast.parse(f"def factory({', '.join(cells)}):\n    pass")
        # The first statement is the definition of `factory`.
        factory.body[0].body = [definition]  # type: ignore[attr-defined]
        compiled = compile(ast.fix_missing_locations(factory), self._function.__code__.co_filename, "exec")
        (outer,) = (constant for constant in compiled.co_consts if isinstance(constant, CodeType))
        codes = [constant for constant in outer.co_consts if isinstance(constant, CodeType)]
        return next(code for code in codes if code.co_name == definition.name)

    def value(self, expression: ast.expr) -> Any:
        """Return the value of an expression if it is known before the method runs; otherwise None.

        It can be known for names, for attributes, and for items of a Sequential, ModuleList or ModuleDict with a constant
        index.
        """
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
        """Return the values of the names in the method. Local variables are None; the first parameter is the module."""
        function = self._function
        local = dict.fromkeys(function.__code__.co_varnames)
        try:
            closure = inspect.getclosurevars(function).nonlocals
        except ValueError:  # a cell that is still empty
            raise CannotBeRewrittenError from None
        return {**function.__globals__, **closure, **local, function.__code__.co_varnames[0]: self._module}

    def _is_self(self, expression: ast.expr) -> bool:
        """Return whether an expression is the first parameter of the method, which is usually named `self`."""
        return isinstance(expression, ast.Name) and expression.id == self._function.__code__.co_varnames[0]


def _method(kind: type, code: CodeType) -> tuple[list[str], FunctionType, bool]:
    """Find the method of a class that has a given code object.

    Returns:
        The names of the method in the class, its function without decorators, and whether it is decorated.

    Raises:
        CannotBeRewrittenError: there is no such method, or several methods differ in their decorators.
    """
    methods = {name: inspect.getattr_static(kind, name) for ancestor in kind.__mro__ for name in vars(ancestor)}
    found = {name: value for name, value in methods.items() if getattr(_undecorated(value), "__code__", None) is code}
    if not found or len(set(found.values())) > 1:
        raise CannotBeRewrittenError
    value = next(iter(found.values()))
    function = _undecorated(value)
    assert isinstance(function, FunctionType)
    return list(found), function, function is not value


def _undecorated(value: Any) -> Any:
    """Return the function inside the decorators of a method; None for a static method or a value that is not callable."""
    is_method = callable(value) and not isinstance(value, staticmethod)
    return inspect.unwrap(value) if is_method else None


def _has_mangled_names(definition: ast.FunctionDef) -> bool:
    """Return whether the definition uses a name such as `__name`.

    Python mangles such names inside a class, so they would mean other names after the rewriting.
    """
    nodes = list(ast.walk(definition))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.arg or "" for node in nodes if isinstance(node, ast.arg | ast.keyword)]
    return any(name.startswith("__") and not name.endswith("__") for name in names)
