"""What the source of a method shows about its calls."""

from __future__ import annotations

import ast
import functools
import linecache
import re
from collections import Counter
from types import CodeType, FunctionType


def begins_with(function: FunctionType, names: tuple[str, ...]) -> bool:
    """Whether the `first_calls` of a method are these, or begin with them."""
    return first_calls(function)[: len(names)] == names


@functools.cache
def called_in_turn(function: FunctionType) -> frozenset[str]:
    """The NAMEs of `x = self.NAME(x)` in a method of x; none where it may show an x to others.

    That is, where a statement reads x more than once, or neither gives x a new value nor returns.
    """
    tree = method_text(function)
    if tree is None:
        return frozenset()
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    reading = [(statement, _reads_of_x(statement)) for statement in statements if _reads_of_x(statement)]
    if sum(reads for _, reads in reading) != _reads_of_x(tree):  # one is in a condition
        return frozenset()
    found = []
    for statement, reads in reading:
        targets = [ast.unparse(target) for target in getattr(statement, "targets", ())]
        if reads > 1 or not (targets == ["x"] or isinstance(statement, ast.Return)):
            return frozenset()
        found += re.findall(r"^x = self\.(\w+)\(x\)$", ast.unparse(statement))
    return frozenset(found)


def _reads_of_x(tree: ast.AST) -> int:
    return sum(
        isinstance(node, ast.Name) and node.id == "x" and isinstance(node.ctx, ast.Load) for node in ast.walk(tree)
    )


def delegated_to(function: FunctionType) -> str | None:
    """The NAME of `return self.NAME(x)`, where a method of x does no more."""
    tree = method_text(function)
    if tree is None:
        return None
    *before, last = tree.body
    found = re.fullmatch(rf"return {_called_by(function)}", ast.unparse(last))
    return found[1] if found is not None and not any(map(_does_something, before)) else None


@functools.cache
def first_calls(function: FunctionType) -> tuple[str, ...]:
    """The NAMEs of `x = self.NAME(x)` that a method of x begins with, each of which it has nowhere else.

    There are none where it does more with `self` than to read its attributes: it will be given another one.
    """
    tree = method_text(function)
    if tree is None:
        return ()
    me, x = function.__code__.co_varnames[:2]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = [node for node in attributes if isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load)]
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    if names.count(me) != sum(node.value.id == me for node in read) or _SEES_SELF & {*names}:
        return ()
    found = []
    for statement in filter(_does_something, tree.body):
        called = re.fullmatch(rf"{x} = {_called_by(function)}", ast.unparse(statement))
        if called is None or called[1] not in named_once(function):
            break
        found.append(called[1])
    return tuple(found)


@functools.cache
def named_once(function: FunctionType) -> frozenset[str]:
    """The attributes, of whatever, that a method names once."""
    tree = method_text(function)
    counts = Counter(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)) if tree else Counter()
    return frozenset(name for name, count in counts.items() if count == 1)


_SEES_SELF = {"super", "__class__", "locals", "vars", "eval", "exec"}


def _called_by(function: FunctionType) -> str:
    """A pattern of `self.NAME(x)`, in a method's own words."""
    me, x = function.__code__.co_varnames[:2]
    return rf"{me}\.(\w+)\({x}\)"


def _does_something(statement: ast.stmt) -> bool:
    return not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def method_text(function: FunctionType) -> ast.FunctionDef | None:
    """The text of a method, where that is what it was compiled from: a file may have been edited since."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    try:
        tree, codes = _compiled("".join(lines))
    except (SyntaxError, ValueError):
        return None
    if code not in codes:
        return None
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == code.co_name)
    return next((text for text in texts if text.lineno == code.co_firstlineno), None)


@functools.lru_cache(8)
def _compiled(text: str) -> tuple[ast.Module, set[CodeType]]:
    """A file's tree, and the code of all that it defines."""
    tree = ast.parse(text)
    codes, found = [compile(tree, "<read>", "exec", dont_inherit=True)], set()
    while codes:
        inside = [const for const in codes.pop().co_consts if isinstance(const, CodeType)]
        codes += inside
        found.update(inside)
    return tree, found
