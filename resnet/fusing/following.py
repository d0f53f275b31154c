"""Follows the text of a module's forward, with what the module holds.

It may have assignments, sums, ReLUs, calls of the module's own children and of functions in it, and conditions on what
the module has. A child that is a convolution with its norm, say, is followed in its turn, so that in the end it is
known what is called, in which order, and on what. Anything else in a forward is `Unread`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from types import FunctionType

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from resnet.fusable import CONV_WITH_NORM, NORM_WITH_ACTIVATION, full_name, is_attention, is_norm, is_sequence
from resnet.fusing.gates import read_gate
from resnet.fusing.layouts import Condition, Equal
from resnet.fusing.sources import Unread, alias, forward_text, function_in, is_builtin, relu_argument, resolved


@dataclass(eq=False)
class Value:
    """What a forward has computed: by one of its modules, by a ReLU or a sum, or its input."""

    what: str  # input, module, gate, relu, sum; or idle: of a module that gave what it was called on
    of: tuple[Value, ...] = ()
    name: str = ""  # of the module, or of a ReLU that is one
    module: nn.Module | None = None

    @property
    def itself(self) -> Value:
        """The value, without the modules that gave what they were called on."""
        return self.of[0].itself if self.what == "idle" else self


@dataclass
class Followed:
    """What was done to a module's input."""

    module: nn.Module
    input: Value = field(default_factory=lambda: Value("input"))
    made: list[Value] = field(default_factory=list)
    conditions: list[Condition | Equal] = field(default_factory=list)
    containers: dict[str, type[nn.Module]] = field(default_factory=dict)  # that were called, and of which class
    idle: list[str] = field(default_factory=list)  # identities that were called

    def make(self, what: str, *of: Value, name: str = "", module: nn.Module | None = None) -> Value:
        value = Value(what, of, name, module)
        self.made.append(value)
        return value

    def call(self, place: str, module: object, of: Value) -> Value:
        """What a module that lies there gives."""
        given = self.given(place, module, of)
        return Value("idle", (of,), place, module) if given.itself is of.itself else given

    def given(self, place: str, module: object, of: Value) -> Value:
        kind = type(module)
        if is_sequence(kind) and "forward" not in vars(module):
            self.containers[place] = kind
            for key, child in module._modules.items():
                of = self.call(f"{place}.{key}", child, of)
            return of
        if kind is nn.Identity:
            self.idle.append(place)
            return of
        if kind is nn.ReLU:
            return self.make("relu", of, name=place)
        if full_name(kind) == CONV_WITH_NORM:
            return self.conv_with_norm(place, module, of)
        if full_name(kind) == NORM_WITH_ACTIVATION:
            self.containers[place] = kind
            of = self.make("module", of, name=place, module=module)
            for name in ("drop", "act"):
                of = self.call(f"{place}.{name}", module._modules.get(name), of)
            return of
        if isinstance(module, (_ConvNd, nn.AvgPool2d)) or is_norm(module):
            return self.make("module", of, name=place, module=module)
        if isinstance(module, nn.Module) and (is_attention(module) or read_gate(module)):
            return self.make("gate", of, name=place, module=module)
        tree = forward_text(kind) if isinstance(module, nn.Module) else None
        if tree is None or "forward" in vars(module):
            raise Unread
        self.containers[place] = kind
        return Forward.of(self, module, kind, f"{place}.", of).returned(tree.body)

    def conv_with_norm(self, place: str, conv: nn.Module, of: Value) -> Value:
        self.containers[place] = type(conv)
        of = self.make("module", of, name=place, module=conv)
        for name in ("norm", "activation"):
            child = getattr(conv, name)
            self.conditions.append(Condition(f"{place}.{name}", is_none=True, answer=child is None))
            of = of if child is None else self.call(f"{place}.{name}", child, of)
        return of

    def steps(self, value: Value) -> list[Value]:
        """What was done to the input, one after the other."""
        found = []
        while value is not self.input:
            if value.what == "sum":
                raise Unread
            if value.what != "idle":
                found.insert(0, value)
            (value,) = value.of
        return found

    def idle_on(self, value: Value) -> list[str]:
        """The modules on the way from the input to a value that gave what they were called on."""
        found = []
        while value is not self.input:
            if value.what == "idle":
                found.insert(0, value.name)
            value = value.of[0]
        return found


@dataclass
class Forward:
    """The forward of a module, or of a child of it, or a function in one."""

    record: Followed
    module: nn.Module
    cls: type[nn.Module]  # the module's, before it was fused
    prefix: str  # of the names of what it holds: none, or one with a dot
    function: FunctionType
    me: str | None  # the module's name in the text
    values: dict[str, Value]
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Followed, module: nn.Module, kind: type[nn.Module], prefix: str, argument: Value) -> Forward:
        """That of a module's class."""
        me, x = kind.forward.__code__.co_varnames[:2]
        return cls(record, module, kind, prefix, kind.forward, me, {x: argument})

    def run(self, body: list[ast.stmt]) -> Value | None:
        """What the statements return; None where they end before."""
        for statement in body:
            match statement:
                case ast.Return(ast.expr() as value):
                    return self.value(value)
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value) if (
                    name != self.me
                ):
                    self.functions.pop(name, None)
                    self.values[name] = self.value(value)
                case ast.AugAssign(ast.Name(name), ast.Add(), value) if (  # the input is the caller's
                    self.values.get(name, self.record.input).itself is not self.record.input
                ):
                    self.values[name] = self.sum(self.values[name], self.value(value))
                case ast.If(test, then, otherwise):
                    returned = self.run(then if self.holds(test) else otherwise)
                    if returned is not None:
                        return returned
                case ast.FunctionDef(name) if name != self.me:
                    self.functions[name] = statement
                case ast.Expr(ast.Constant()):
                    pass
                case _:
                    raise Unread
        return None

    def returned(self, body: list[ast.stmt]) -> Value:
        value = self.run(body)
        if value is None:
            raise Unread
        return value

    def value(self, expression: ast.expr) -> Value:
        match expression:
            case ast.Name(name) if name in self.values:
                return self.values[name]
            case ast.BinOp(left, ast.Add(), right):
                return self.sum(self.value(left), self.value(right))
            case ast.IfExp(test, then, otherwise):
                return self.value(then if self.holds(test) else otherwise)
            case ast.Call(ast.Name(name), [argument], []) if name in self.functions:
                return self.inner(self.functions[name], self.value(argument))
            case ast.Call(called, [argument], []) if (name := self.own(called)) is not None:
                return self.record.call(self.prefix + name, self.module._modules.get(name), self.value(argument))
            case ast.Call(called, [left, right], []) if resolved(called, self.function) is torch.add:
                return self.sum(self.value(left), self.value(right))
            case _ if (argument := relu_argument(expression, self.function)) is not None:
                return self.record.make("relu", self.value(argument))
        raise Unread

    def sum(self, *of: Value) -> Value:
        if self.prefix:  # what the module holds is a block then
            raise Unread
        return self.record.make("sum", *of)

    def inner(self, function: ast.FunctionDef, argument: Value) -> Value:
        """What a function in the forward returns. It sees the module, and no other value of the forward."""
        made, names = function_in(self.function, function), [each.arg for each in function.args.args]
        if made is None or len(names) != 1:
            raise Unread
        me = self.me if self.me in made.__code__.co_freevars else None
        return replace(self, function=made, me=me, values={names[0]: argument}, functions={}).returned(function.body)

    def holds(self, test: ast.expr) -> bool:
        """The answer to a condition, which is noted."""
        match test:
            case ast.UnaryOp(ast.Not(), operand):
                return not self.holds(operand)
            case ast.BoolOp(ast.And(), tests):
                return all(map(self.holds, tests))
            case ast.BoolOp(ast.Or(), tests):
                return any(map(self.holds, tests))
            case ast.Compare(operand, [ast.Is() | ast.IsNot() as asked], [ast.Constant(None)]):
                answer = self.note(operand, is_none=True)
                return answer if isinstance(asked, ast.Is) else not answer
            case ast.Compare(operand, [ast.Gt()], [ast.Constant(0)]):
                return self.number(operand) > 0
            case ast.Call(ast.Name("hasattr"), [ast.Name(me), ast.Constant(str() as name)], []) if (
                me == self.me and is_builtin("hasattr", self.function)
            ):
                return self.has(name)
        return self.note(test, is_none=False)

    def note(self, attribute: ast.expr, is_none: bool) -> bool:
        name = self.own(attribute)
        value = None if name is None else getattr(self.module, name)
        if name is None or not isinstance(value, (nn.Module, bool, int, str, type(None))):
            raise Unread
        answer = value is None if is_none else bool(value)
        self.record.conditions.append(Condition(self.prefix + name, is_none, answer))
        return answer

    def number(self, attribute: ast.expr) -> float:
        name = self.own(attribute)
        value = None if name is None else vars(self.module).get(name)
        if type(value) not in (int, float):
            raise Unread
        self.record.conditions.append(Equal(self.prefix + name, value))
        return value

    def has(self, name: str) -> bool:
        """Whether the module has an attribute, which is not None."""
        found = hasattr(self.module, name)
        if found and (self.named(name) is None or getattr(self.module, name) is None):
            raise Unread
        self.record.conditions.append(Condition(self.prefix + name, is_none=True, answer=not found))
        return found

    def own(self, expression: ast.expr) -> str | None:
        """NAME of `self.NAME`, where that is the module's own and not its class's."""
        match expression:
            case ast.Attribute(ast.Name(me), name) if me == self.me:
                return self.named(name)
        return None

    def named(self, name: str) -> str | None:
        """The name of what a module has by a name or by a property, which gives what another attribute names."""
        asked = alias(self.cls, name)
        if asked is not None and isinstance(found := vars(self.module).get(asked), str):
            self.record.conditions.append(Equal(self.prefix + asked, found))
            name = found
        places = vars(self.module), self.module._modules
        return name if sum(name in place for place in places) == 1 and not hasattr(self.cls, name) else None
