"""Finds, in the source of modules' classes, where they read the weight of a layer within them instead of calling it.

`F.linear(x, self.out_proj.weight)` runs without the layer, and so without an adapter in its place. The syntax trees of
a class's forward and of the functions that it calls are searched; the layer may be in a variable, in a list, or passed
as an argument. `weight.dtype` and the like do not count. A branch whose condition is known from the module's attributes
(`if self.pretraining_tp > 1`) counts only if it is taken.
"""

import ast
import contextlib
import dis
import functools
import inspect
import linecache
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn

# Attributes, methods and functions of a weight that do not compute with its values.
_PROPERTIES = {"dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "requires_grad", "layout", "grad", "__class__"}
_METHODS = {"size", "dim", "numel", "element_size", "is_floating_point", "data_ptr", "get_device", "stride"}
_FUNCTIONS = {"isinstance", "hasattr", "type", "id", "zeros_like", "ones_like", "empty_like", "is_tensor", "len"}
_DEPTH = 6  # of nested calls that are followed

# From a module to one within it: names of attributes, None for any element of a list.
Path = tuple[str | None, ...]
Condition = tuple[ast.expr, str, bool]  # an expression, the name in it that means self, the value that it must have


@dataclass(frozen=True)
class Read:
    """One place in a class's code that reads a weight.

    Attributes:
        path: to the layer whose weight is read.
        conditions: those of the branches around it.
    """

    path: Path
    conditions: tuple[Condition, ...]


def weights_read(module: nn.Module) -> list[nn.Module]:
    """The modules within `module` whose weight its forward reads, or may read."""
    if not module._modules:
        return []
    own = vars(module).get("forward")
    forward = own.__func__ if isinstance(own, MethodType) and own.__self__ is module else type(module).forward
    found: dict[int, nn.Module] = {}
    for read in reads_of(cast(Any, type(module)), inspect.unwrap(forward)):
        if all(_value(test, name, module) in (None, value) for test, name, value in read.conditions):
            found |= {id(each): each for each in _resolve(module, read.path)}
    return list(found.values())


@functools.lru_cache(maxsize=2048)
def reads_of(cls: type, forward: Any) -> tuple[Read, ...]:
    """The reads in `forward`, a function of the class `cls`, and in the functions that it calls."""
    if not isinstance(forward, FunctionType):
        return ()
    search = _Search(cls)
    search.function(forward, ((),))
    return tuple(dict.fromkeys(search.found))


def _resolve(module: Any, path: Path) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    for each in module._modules.values() if path[0] is None else (getattr(module, path[0], None),):
        if isinstance(each, nn.Module):
            yield from _resolve(each, path[1:])


def _value(test: ast.expr, name: str, module: nn.Module) -> bool | None:
    """Whether the condition holds for `module`; None where that is not known, or may change."""
    if isinstance(test, ast.BoolOp):
        values = [_value(each, name, module) for each in test.values]
        dominant = isinstance(test.op, ast.Or)
        return dominant if dominant in values else None if None in values else not dominant
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, name, module)
        return None if value is None else not value
    known = (ast.Compare, ast.Attribute, ast.Name, ast.Constant, ast.cmpop, ast.expr_context)
    parts = list(ast.walk(test))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    changing = any(isinstance(part, ast.Attribute) and part.attr == "training" for part in parts)
    if names - {name} or changing or not all(isinstance(part, known) for part in parts):
        return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}}, {name: module}))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # the function itself would fail there too, or sets the attribute before


@functools.lru_cache(maxsize=2048)
def _tree(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function's syntax tree; None where there is no source, as of functions that exec or a Python prompt made."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[max(code.co_firstlineno - 1, 0) :]
    try:
        tree = ast.parse(textwrap.dedent("".join(inspect.getblock(lines)))).body[0]
    except (IndexError, SyntaxError, tokenize.TokenError):
        return None
    return tree if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


class _Search(ast.NodeVisitor):
    """One search through a class's functions.

    Attributes:
        found: the reads.
        seen: the calls that were followed.
        properties: expressions of which only a property such as the dtype is used.
        variables: in the present function, those that hold the module (an empty path) or something within it.
        conditions: of the branches around the present statement.
        name: of self in the present function, empty where it has none.
        current, depth: the present function, and how many calls lead to it.
    """

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.found: list[Read] = []
        self.seen: set = set()
        self.properties: set[ast.expr] = set()
        self.variables: dict[str, Path] = {}
        self.conditions: tuple[Condition, ...] = ()
        self.name = ""
        self.current: Any = None
        self.depth = 0

    def function(self, function: Any, paths: tuple[Path | None, ...], named: tuple[tuple[str, Path], ...] = ()) -> None:
        """Searches a function that is called.

        Args:
            paths: of its positional arguments, None for what is not within the module.
            named: those of its keyword arguments that are within the module.
        """
        key = (function, paths, named)
        if self.depth > _DEPTH or key in self.seen or not isinstance(function, FunctionType):
            return
        if function.__module__ == "torch.nn.modules.transformer":
            return  # parents.disable_fast_paths covers those
        self.seen.add(key)
        if (tree := _tree(function)) is None:
            return self.code(function)
        outer = self.variables, self.name, self.current
        names = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
        self.variables = {name: path for name, path in zip(names, paths, strict=False) if path is not None}
        self.variables |= dict(named)
        self.name = names[0] if names and paths and paths[0] == () else ""
        self.current, self.depth = function, self.depth + 1
        for statement in tree.body:
            self.visit(statement)
        self.variables, self.name, self.current = outer
        self.depth -= 1

    def code(self, function: FunctionType) -> None:
        """Searches the instructions of a function without source for reads of self's attributes, on any condition."""
        own, instructions = function.__code__.co_varnames[:1], list(dis.get_instructions(function))
        path: Path | None = None
        for n, each in enumerate(instructions):
            if each.opname.startswith("LOAD_FAST"):
                names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
                path = () if names[-1:] == own else None
            elif path is None or each.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                path = None
            else:
                following = instructions[n + 1] if n + 1 < len(instructions) else each
                loads = following.opname in ("LOAD_ATTR", "LOAD_METHOD")
                property_only = loads and following.argval in _PROPERTIES | _METHODS
                if each.argval == "weight" and path and not property_only:
                    self.found.append(Read(path, self.conditions))
                called = inspect.getattr_static(self.cls, each.argval, None) if path == () else None
                if callable(called):
                    self.function(inspect.unwrap(called), ((),))
                path = (*path, each.argval)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        for branch, value in ((node.body, True), (node.orelse, False)):
            with self.condition(node.test, value):
                for each in branch if isinstance(branch, list) else [branch]:
                    self.visit(each)

    visit_IfExp = visit_If

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self.loop(node.target, node.iter)
        for each in (*node.body, *node.orelse):
            self.visit(each)

    visit_AsyncFor = visit_For

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for each, part in zip(target.elts, node.value.elts, strict=False):
                    self.assign(each, self.path(part))
            else:
                self.assign(target, self.path(node.value))

    @contextlib.contextmanager
    def condition(self, test: ast.expr, value: bool) -> Iterator[None]:
        before = self.conditions
        if self.name:  # else the condition cannot be about the module's attributes
            self.conditions = (*before, (test, self.name, value))
        yield
        self.conditions = before

    def loop(self, target: ast.expr, iterable: ast.expr) -> None:
        called = getattr(iterable.func, "id", "") if isinstance(iterable, ast.Call) else ""
        targets, iterables = [target], [iterable]
        if called in ("enumerate", "zip"):
            targets, iterables = list(getattr(target, "elts", [])), list(getattr(iterable, "args", []))
            targets = targets[-1:] if called == "enumerate" else targets
        for each, over in zip(targets, iterables, strict=False):
            path = self.path(over)
            self.assign(each, None if path is None else (*path, None))

    def assign(self, target: ast.expr, path: Path | None) -> None:
        if isinstance(target, ast.Name):
            self.variables.pop(target.id, None)
            if path is not None:
                self.variables[target.id] = path

    def path(self, node: ast.expr) -> Path | None:
        """The path of an expression's value; None where it is not within the module."""
        if isinstance(node, ast.Name):
            return self.variables.get(node.id)
        step: str | None = None
        if isinstance(node, ast.Call):  # getattr(self, "fc")
            named = len(node.args) > 1 and getattr(node.func, "id", "") == "getattr"
            if not (named and isinstance(node.args[1], ast.Constant)):
                return None
            within, step = node.args[0], str(node.args[1].value)
        elif isinstance(node, ast.Attribute):
            within, step = node.value, node.attr
        elif isinstance(node, ast.Subscript):
            within = node.value
            if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
                step = node.slice.value
        else:
            return None
        path = self.path(within)
        return None if path is None else (*path, step)

    def generic_visit(self, node: ast.AST) -> None:
        for generator in getattr(node, "generators", ()):  # of a comprehension
            self.loop(generator.target, generator.iter)
        super().generic_visit(node)

    def part(self, node: ast.expr, property_only: bool) -> None:
        """Searches an expression; `property_only`: only a property of its value is used, such as the dtype."""
        inner = node
        while isinstance(inner, ast.Subscript):
            inner = inner.value
        if property_only:
            self.properties.add(inner)
        self.visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        identity = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        for operand in (node.left, *node.comparators):
            self.part(operand, identity)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self.path(node.value) if node.attr == "weight" and isinstance(node.ctx, ast.Load) else None
        if path and node not in self.properties:
            self.found.append(Read(path, self.conditions))
        self.part(node.value, node.attr in _PROPERTIES)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if isinstance(node.func, ast.Attribute):
            self.part(node.func.value, name in _METHODS)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.part(argument, name in _FUNCTIONS)
        called, first = self.callee(node.func)
        paths = (*first, *(self.path(argument) for argument in node.args))
        named = {keyword.arg: self.path(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        given = tuple((key, path) for key, path in named.items() if path is not None)
        if callable(called) and (given or any(path is not None for path in paths)):
            self.function(inspect.unwrap(called), paths, given)

    def callee(self, function: ast.expr) -> tuple[Any, tuple[Path, ...]]:
        """The function that is called, and the path of self, (), as its first argument where it is a method."""
        if isinstance(function, ast.Name):
            return self.current.__globals__.get(function.id), ()
        if not isinstance(function, ast.Attribute):
            return None, ()
        if self.path(function.value) == ():
            called = inspect.getattr_static(self.cls, function.attr, None)
            return (called.__func__, ()) if isinstance(called, staticmethod) else (called, ((),))
        if isinstance(function.value, ast.Call) and getattr(function.value.func, "id", "") == "super":
            own = [vars(cls)[function.attr] for cls in self.cls.__mro__ if function.attr in vars(cls)]
            at = [n for n, each in enumerate(own) if callable(each) and inspect.unwrap(each) is self.current]
            return (own[at[0] + 1] if at and at[0] + 1 < len(own) else None), ((),)
        return None, ()
