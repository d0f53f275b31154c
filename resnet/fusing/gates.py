"""Squeeze-and-excitation that somebody wrote: a forward whose text says that it is that."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from resnet.fusable import Attention
from resnet.fusing.sources import Unread, forward_text, relu_argument, resolved

_SIGMOIDS = torch.sigmoid, F.sigmoid


def read_gate(module: nn.Module) -> Attention | None:
    """What the forward of a module calls on the means of its input's maps, to multiply the maps with; else None.

    It is followed from its first line to its last. It may take means by a pool or by `mean`, and have them in a matrix
    (N, C) between two calls of `view`. It may ask for flags.
    """
    tree = forward_text(type(module))
    if tree is None:
        return None
    try:
        return _Reader(module).attention(tree.body)
    except (Unread, ValueError):
        return None


@dataclass(frozen=True)
class _Value:
    """The input, or what was made of its means."""

    called: tuple[str, ...] | None = None  # None: the input
    pool: str = ""
    means: str = "map"  # what the modules are called on: see `Attention`
    is_map: bool = True  # (N, C, 1, 1), else (N, C)
    expanded: bool = False  # to the input's shape


_INPUT = _Value()


class _Reader:
    """Follows the text of a forward."""

    def __init__(self, module: nn.Module):
        self.module, self.cls = module, type(module)
        self.function, self.flags = self.cls.forward, {}
        self.me, x = self.function.__code__.co_varnames[:2]
        self.values: dict[str, _Value] = {x: _INPUT}
        self.sizes: dict[str, str] = {}  # what a name stands for: N, C, H or W

    def attention(self, statements: list[ast.stmt]) -> Attention:
        """What the statements multiply the input with and return."""
        for at, statement in enumerate(statements):
            match statement:
                case ast.Return(ast.BinOp(left, ast.Mult(), right)):
                    return self.product(left, right)
                case ast.Assign([ast.Name(name)], ast.BinOp(left, ast.Mult(), right)):
                    if [ast.unparse(each) for each in statements[at + 1 :]] != [f"return {name}"]:
                        raise Unread
                    return self.product(left, right)
                case ast.Assign([ast.Tuple(targets)], value):
                    for target, size in zip(targets, self.sizes_of(value), strict=True):
                        self.give(target, size=size)
                case ast.Assign([target], value) | ast.AnnAssign(target, _, ast.expr() as value):
                    self.give(target, self.value(value))
                case ast.If(test, then, otherwise):
                    return self.attention([*(then if self.holds(test) else otherwise), *statements[at + 1 :]])
                case ast.Expr(ast.Constant()):
                    pass
                case _:
                    raise Unread
        raise Unread

    def holds(self, test: ast.expr) -> bool:
        """The answer to a question for a flag, which is noted."""
        match test:
            case ast.UnaryOp(ast.Not(), operand):
                return not self.holds(operand)
            case ast.Attribute(ast.Name(self.me), name) if not hasattr(self.cls, name) and name != "training":
                if isinstance(value := vars(self.module).get(name), bool):
                    return self.flags.setdefault(name, value)
        raise Unread

    def give(self, target: ast.expr, value: _Value | None = None, size: str = "") -> None:
        """Bind a name to a value or a size. Unread where the value that it had was not used."""
        if not isinstance(target, ast.Name) or target.id == self.me:
            raise Unread
        if self.values.pop(target.id, _INPUT) != _INPUT:
            raise Unread
        self.sizes[target.id] = size
        if value is not None:
            self.values[target.id] = value

    def product(self, left: ast.expr, right: ast.expr) -> Attention:
        if self.is_input(left) == self.is_input(right):
            raise Unread
        gates = self.value(right if self.is_input(left) else left)
        unused = any(value != _INPUT for value in self.values.values())
        if unused or gates.called is None or not gates.is_map:
            raise Unread
        unset, given = (tuple(name for name, flag in self.flags.items() if flag is each) for each in (False, True))
        return Attention(gates.called, gates.pool, unset, gates.means, given)

    def is_input(self, expression: ast.expr) -> bool:
        return isinstance(expression, ast.Name) and self.values.get(expression.id) == _INPUT

    def value(self, expression: ast.expr) -> _Value:
        """What an expression gives. A name is read once, unless it is the input: a ReLU may overwrite what it reads."""
        match expression:
            case ast.Name(name) if name in self.values:
                return _INPUT if self.is_input(expression) else self.values.pop(name)
            case ast.Call(ast.Attribute(ast.Name(self.me), name), [of], []) if not hasattr(self.cls, name):
                return _Value((), name) if self.is_input(of) else self.call(name, self.value(of))
            case ast.Call(called, [of], []) if any(resolved(called, self.function) is each for each in _SIGMOIDS):
                return self.call("sigmoid()", self.value(of))
            case ast.Call(ast.Attribute(of, "sigmoid"), [], []):
                return self.call("sigmoid()", self.value(of))
            case _ if (of := relu_argument(expression, self.function)) is not None:
                return self.call("relu()", self.value(of))
            case ast.Call(called, [of, ast.Constant(1)], []) if self.is_input(of):
                if resolved(called, self.function) is F.adaptive_avg_pool2d:
                    return _Value(())
            case ast.Call(ast.Attribute(of, "mean"), _, _) if self.is_input(of):
                return _means(expression)
            case ast.Call(ast.Attribute(of, "view" | "reshape"), sizes, []):
                return _viewed(self.value(of), [self.size(each) for each in sizes])
            case ast.Call(ast.Attribute(ast.Call(ast.Attribute(of, "unsqueeze"), [at], []), "unsqueeze"), [then], []):
                return _viewed(self.value(of), _WITH_PIXELS if (ast.unparse(at), ast.unparse(then)) in _AFTER else [])
            case ast.Subscript(of, at) if ast.unparse(at).strip("()") == ":, :, None, None":
                return _viewed(self.value(of), _WITH_PIXELS)
            case ast.IfExp(test, then, otherwise):
                return self.value(then if self.holds(test) else otherwise)
            case ast.Call(ast.Attribute(of, "expand_as"), [x], []) if self.is_input(x):
                return replace(self.value(of), expanded=True)
        raise Unread

    def call(self, name: str, of: _Value) -> _Value:
        if of.called is None or of.expanded or of.is_map != (of.means == "map"):
            raise Unread
        return replace(of, called=(*of.called, name))

    def sizes_of(self, expression: ast.expr) -> list[str]:
        match expression:
            case ast.Call(ast.Attribute(x, "size"), [], []) | ast.Attribute(x, "shape") if self.is_input(x):
                return ["N", "C", "H", "W"]
            case ast.Subscript(value, ast.Slice(None, ast.Constant(2), None)):
                return self.sizes_of(value)[:2]
        raise Unread

    def size(self, expression: ast.expr) -> str:
        match expression:
            case ast.Name(name) if name in self.sizes:
                return self.sizes[name]
            case ast.Call(ast.Attribute(x, "size"), [ast.Constant(0 | 1 as at)], []) if self.is_input(x):
                return "NC"[at]
            case ast.Subscript(ast.Attribute(x, "shape"), ast.Constant(0 | 1 as at)) if self.is_input(x):
                return "NC"[at]
            case ast.Constant(int()) | ast.UnaryOp(ast.USub(), ast.Constant(int())):
                return ast.unparse(expression)
        raise Unread


def _means(call: ast.Call) -> _Value:
    """`x.mean((2, 3))` and its like."""
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    arguments |= {name: ast.unparse(value) for name, value in zip(("dim", "keepdim"), call.args)}
    dims, keepdim = arguments.pop("dim", ""), arguments.pop("keepdim", "False")
    if arguments or dims.strip("()[]") not in ("2, 3", "-2, -1") or keepdim not in ("True", "False"):
        raise Unread
    return _Value(()) if keepdim == "True" else _Value((), means="matrix", is_map=False)


_WITH_PIXELS = ["N", "C", "1", "1"]
_AFTER = ("2", "3"), ("-1", "-1"), ("2", "-1"), ("-1", "2")  # the dimensions at which `unsqueeze` adds two pixels' axes


def _viewed(of: _Value, sizes: list[str]) -> _Value:
    if of.is_map and not of.expanded and of.called == () and sizes in (["N", "C"], ["N", "-1"]):
        return replace(of, means="matrix", is_map=False)
    if not of.is_map and not of.expanded and sizes in (_WITH_PIXELS, ["N", "-1", "1", "1"]):
        return replace(of, is_map=True)
    raise Unread
