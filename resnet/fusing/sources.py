"""What the source of a method shows about its calls."""

from __future__ import annotations

import ast
import copy
import functools
import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from resnet.fusable import is_plain

_Read = TypeVar("_Read")


def _kept(read: Callable[[FunctionType], _Read]) -> Callable[[FunctionType], _Read]:
    """A cache of what is read of a function, which may be given other code: a notebook does so when a file changes."""
    found: dict[tuple[FunctionType, CodeType], _Read] = {}

    def kept(function: FunctionType) -> _Read:
        key = function, function.__code__
        if key not in found:
            found[key] = read(function)
        return found[key]

    return functools.update_wrapper(kept, read)


@_kept
def called_in_turn(function: FunctionType) -> frozenset[str]:
    """The NAMEs of `x = self.NAME(x)` in a method, for each variable x whose values nothing else reads.

    Something else does where a statement reads x more than once, or reads it and neither assigns x nor returns.
    """
    tree = method_text(function)
    if tree is None:
        return frozenset()
    me = function.__code__.co_varnames[0]
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    found = []
    for x in _seen_by_it_alone(function):
        reading = [(statement, _reads_of(x, statement)) for statement in statements if _reads_of(x, statement)]
        if sum(reads for _, reads in reading) == _reads_of(x, tree) and all(  # none is in a condition
            reads == 1 and ([x] == _targets(statement) or isinstance(statement, ast.Return))
            for statement, reads in reading
        ):
            called = rf"{x} = {me}\.(\w+)\({x}\)"
            found += [match[1] for each, _ in reading if (match := re.fullmatch(called, ast.unparse(each)))]
    return frozenset(found)


def _targets(statement: ast.stmt) -> list[str]:
    return [ast.unparse(target) for target in getattr(statement, "targets", ())]


def _reads_of(name: str, tree: ast.AST) -> int:
    return sum(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load) for node in ast.walk(tree)
    )


def delegated_to(function: FunctionType) -> str | None:
    """The NAME of `return self.NAME(x)`, where a method of x does no more."""
    tree = method_text(function)
    if tree is None:
        return None
    *before, last = tree.body
    me, x = function.__code__.co_varnames[:2]
    found = re.fullmatch(rf"return {me}\.(\w+)\({x}\)", ast.unparse(last))
    return found[1] if found is not None and not any(map(_does_something, before)) else None


class Call(NamedTuple):
    """`self.NAME(x)` in a method, or a ReLU of x that is a function."""

    name: str  # "" for a ReLU
    node: ast.expr
    of: ast.expr  # x


def chains_of_calls(function: FunctionType, taken: Taken = lambda branches: None) -> list[list[Call]]:
    """What a method calls one after the other, each on what the one before gave, which nothing else sees.

    Only modules that it names once count. There are no chains where it does more with `self` than to read attributes,
    since it will be called with another `self`. `taken` gives the statements of an `if` that it runs, or None.
    """
    tree = method_text(function)
    if tree is None or _shows_itself(tree, function):
        return []
    chains, variables = [], _seen_by_it_alone(function)
    for statements in _blocks(tree, taken):
        before = None
        for statement in filter(_does_something, statements):
            target, value = _assigned(statement)
            calls, read = _nested_calls(value, function)
            if before is not None and before == read and target in (read, None):
                chains[-1] += calls
            else:
                chains.append(calls)
            before = target if calls and target in variables else None
    return chains


def _seen_by_it_alone(function: FunctionType) -> set[str]:
    """The variables of a method that no function in it sees."""
    return {*function.__code__.co_varnames} - {*function.__code__.co_cellvars}


def has_chain(function: FunctionType, names: tuple[str, ...]) -> bool:
    """Whether a method calls the modules of these names so, one after the other."""
    if reads_by_name(function):
        return False
    chains = [tuple(call.name for call in chain) for chain in chains_of_calls(function)]
    return any(chain[at : at + len(names)] == names for chain in chains for at in range(len(chain)))


def _shows_itself(tree: ast.FunctionDef, function: FunctionType) -> bool:
    me = function.__code__.co_varnames[0]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = [node for node in attributes if isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load)]
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    # What every object has, as `__class__`, would be that of the other one.
    own = [node for node in read if node.value.id == me and not re.fullmatch("__.*__", node.attr)]
    reads = len(own) + len(reads_by_name(function))
    return names.count(me) != reads or not _SEES_SELF.isdisjoint(names)


@_kept
def reads_by_name(function: FunctionType) -> tuple[ast.expr, ...]:
    """The names of the attributes that a method reads by `getattr(self, name)`."""
    tree, me = method_text(function), function.__code__.co_varnames[0]
    if tree is None or not is_builtin("getattr", function):
        return ()
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("getattr"), [ast.Name(whose), name, *_]) if whose == me:
                found.append(name)
    return tuple(found)


def listed_in(function: FunctionType, name: str) -> set[str]:
    """The NAMEs of `for name in self.NAME` and its like; none if a method gives a name any other value."""
    tree, me = method_text(function), function.__code__.co_varnames[0]
    lists, bound = set(), 0
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() | ast.Constant() | ast.Name(ctx=ast.Load()):
                pass
            case ast.Name(written, ast.Store() | ast.Del()) if written == name:
                bound += 1
            case ast.For(
                ast.Tuple([_, ast.Name(written)]),
                ast.Call(ast.Name("enumerate"), [ast.Attribute(ast.Name(whose), of)], []),
            ) if (written, whose) == (name, me) and is_builtin("enumerate", function):
                lists.add(of)
                bound -= 1
            case ast.For(ast.Name(written), ast.Attribute(ast.Name(whose), of)) if (written, whose) == (name, me):
                lists.add(of)
                bound -= 1
            case _ if any(
                name in (value if isinstance(value, list) else [value]) for _, value in ast.iter_fields(node)
            ):
                bound += 1  # as an argument, a pattern, an import
    return lists if bound == 0 and name in _seen_by_it_alone(function) else set()


def is_builtin(name: str, function: FunctionType) -> bool:
    code = function.__code__
    return name not in (*function.__globals__, *code.co_varnames, *code.co_cellvars, *code.co_freevars)


Taken = Callable[[ast.If], list[ast.stmt] | None]


def _blocks(tree: ast.AST, taken: Taken) -> Iterator[list[ast.stmt]]:
    """Each list of statements that follow each other in a method, but for those of functions and classes in it."""
    for _, value in ast.iter_fields(tree):
        children = value if isinstance(value, list) else [value]
        if children and isinstance(children[0], ast.stmt):
            children = list(_in_line(children, taken))
            yield children
        for child in children:
            if isinstance(child, ast.AST) and not isinstance(
                child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
            ):
                yield from _blocks(child, taken)


def _in_line(statements: list[ast.stmt], taken: Taken) -> Iterator[ast.stmt]:
    """Statements, with those of a branch that is taken in the place of its `if`."""
    for statement in statements:
        branch = taken(statement) if isinstance(statement, ast.If) else None
        yield from [statement] if branch is None else _in_line(branch, taken)


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """(name, value) of an assignment, (None, value) of a return, (None, None) of any other statement."""
    match statement:
        case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
            return name, value
        case ast.Return(value):
            return None, value
    return None, None


def _nested_calls(value: ast.expr | None, function: FunctionType) -> tuple[list[Call], str | None]:
    """The nested calls that give a value, the innermost first, and its argument's name; None if that is no name."""
    calls, me, once = [], function.__code__.co_varnames[0], named_once(function)
    while True:
        match value:
            case ast.Call(ast.Attribute(ast.Name(whose), name), [of], []) if whose == me and name in once:
                pass
            case _ if (of := relu_argument(value, function)) is not None:
                name = ""
            case _:
                return calls, value.id if isinstance(value, ast.Name) else None
        calls.insert(0, Call(name, value, of))
        value = of


_RELUS = F.relu, F.relu_, torch.relu, torch.relu_


def relu_argument(expression: ast.expr | None, function: FunctionType) -> ast.expr | None:
    """What the ReLU of an expression in a method is taken of; None for any other expression."""
    match expression:
        case ast.Call(called, [of], options) if any(resolved(called, function) is relu for relu in _RELUS):
            return of if _in_place(options) else None
        case ast.Call(ast.Call(made, [], options), [of], []) if resolved(made, function) is nn.ReLU:
            return of if _in_place(options) else None
        case ast.Call(ast.Attribute(of, "relu" | "relu_"), [], []) if resolved(of, function) is None:
            return of
    return None


def _in_place(options: list[ast.keyword]) -> bool:
    """Whether a ReLU's options say no more than that it may overwrite what it reads."""
    return all(option.arg == "inplace" and isinstance(option.value, ast.Constant) for option in options)


def resolved(expression: ast.expr, function: FunctionType) -> object:
    """What a name outside of a method stands for, as `F.relu` does; None where that is not known."""
    code = function.__code__
    match expression:
        case ast.Name(name) if name not in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            return function.__globals__.get(name)
        case ast.Attribute(value, name) if isinstance(found := resolved(value, function), ModuleType):
            return getattr(found, name, None)
    return None


def without(function: FunctionType, call: Call) -> FunctionType:
    """The method with a call in it replaced by the call's argument."""
    code = function.__code__
    changed = copy.deepcopy(_compiled(_file_of(function))[0], {id(call.node): call.of})
    where = code.co_name, code.co_firstlineno
    code = next(each for each in _codes_of(changed, code.co_filename) if (each.co_name, each.co_firstlineno) == where)
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


@_kept
def named_once(function: FunctionType) -> frozenset[str]:
    """The attributes, of whatever, that a method names once."""
    return frozenset(name for name, count in times_named(function).items() if count == 1)


@_kept
def times_named(function: FunctionType) -> Counter[str]:
    """How often a method names an attribute, of whatever."""
    tree = method_text(function)
    return Counter(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)) if tree else Counter()


_SEES_SELF = {"super", "__class__", "locals", "vars", "eval", "exec"}


def _does_something(statement: ast.stmt) -> bool:
    return not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


class Unread(Exception):
    """A text says something that is not looked for, or that is not understood."""


def alias(cls: type, name: str) -> str | None:
    """The NAME of a property that does no more than `return getattr(self, self.NAME)`; None for all else."""
    found = getattr(cls, name, None)
    return _names_another(found.fget) if type(found) is property and type(found.fget) is FunctionType else None


@_kept
def _names_another(getter: FunctionType) -> str | None:
    tree = method_text(getter)
    if tree is None or not is_builtin("getattr", getter):
        return None
    *before, last = tree.body
    me = tree.args.args[0].arg
    matched = re.fullmatch(rf"return getattr\({me}, {me}\.(\w+)\)", ast.unparse(last))
    return matched[1] if matched is not None and not any(map(_does_something, before)) else None


def function_in(method: FunctionType, text: ast.FunctionDef) -> FunctionType | None:
    """A function that a method's text defines, to look names up with; None where it may be another one."""
    args = text.args
    if text.decorator_list or args.posonlyargs or args.kwonlyargs or args.vararg or args.kwarg:
        return None
    codes = [code for code in method.__code__.co_consts if isinstance(code, CodeType)]
    code = next(code for code in codes if (code.co_name, code.co_firstlineno) == (text.name, text.lineno))
    return FunctionType(code, method.__globals__, closure=tuple(CellType() for _ in code.co_freevars))


_texts: dict[type[nn.Module], ast.FunctionDef | None] = {}


def forward_text(cls: type[nn.Module]) -> ast.FunctionDef | None:
    """The forward of a class; None where calling a module may do something else, or where there is no text.

    Of a class that was read before it is the last one that was its own: `fuse` is to say that it was replaced.
    """
    if is_plain(cls):
        _texts[cls] = _kept_text(cls.forward)
    return _texts.get(cls)


def method_text(function: FunctionType) -> ast.FunctionDef | None:
    """The text of a method, where that is what it was compiled from: a file may have been edited since."""
    code = function.__code__
    try:
        tree, codes = _compiled(_file_of(function))
    except (SyntaxError, ValueError):
        return None
    if code not in codes:
        return None
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == code.co_name)
    return next((text for text in texts if (*text.decorator_list, text)[0].lineno == code.co_firstlineno), None)


_kept_text = _kept(method_text)


def _file_of(function: FunctionType) -> str:
    return "".join(linecache.getlines(function.__code__.co_filename, function.__globals__))


@functools.lru_cache(8)
def _compiled(text: str) -> tuple[ast.Module, set[CodeType]]:
    """A file's tree, and the code of all that it defines."""
    tree = ast.parse(text)
    return tree, {*_codes_of(tree, "<read>")}


def _codes_of(tree: ast.Module, name: str) -> list[CodeType]:
    codes = [compile(tree, name, "exec", dont_inherit=True)]
    for code in codes:  # which grows
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return codes
