"""Blocks and stems that somebody wrote: a forward whose text says that it is one, or that it has one.

A block's forward may have assignments, sums, ReLUs, calls of the module's own children and of functions in it, and
conditions on what the module has. It is followed for one module, and so is that of a child which is a convolution with
its norm, say, so that in the end it is known what is called, in which order, and on what. With anything else in it a
module is left alone.
"""

from __future__ import annotations

import ast
import itertools
from dataclasses import dataclass, field, replace
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resnet.fusable import Attention, is_attention, is_norm, is_plain, is_sequence, was_replaced
from resnet.fused.module import autocast_dtype
from resnet.fusing.blocks import BlockMixin
from resnet.fusing.gates import read_gate
from resnet.fusing.known import Known
from resnet.fusing.layouts import BlockLayout, Condition, Equal, StemLayout, held_at
from resnet.fusing.sources import (
    Unread,
    alias,
    chains_of_calls,
    delegated_to,
    forward_text,
    function_in,
    named_once,
    relu_argument,
    resolved,
    without,
)
from resnet.fusing.stems import POOLS, FoundMixin, alike


class WrittenMixin(BlockMixin):
    """A residual block of a class that nobody has listed."""

    def _call(self, x: Tensor) -> Tensor:
        if not all(condition.holds(self) for condition in self._known.conditions):
            parts = "its forward takes another way than it did when it was fused"
        else:
            parts = self._parts()
            if type(parts) is not str and parts.shortcut is None and _is_cast(x):
                parts = f"autocast leaves the input {x.dtype}, which is added"
        return self._run(x, parts)


class WrittenNetworkMixin(FoundMixin):
    """A network of a class that nobody has listed, whose forward has a stem."""

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        if "_layout" in vars(cls) and not cls._layout.relu:
            cls._around = staticmethod(_without_relu(cls._eager_method, cls._layout))

    def _call(self, x: Tensor) -> Tensor:
        if self._layout.relu or self._around is not None:
            return super()._call(x)
        return self._eager_method(x)  # the text is not what it was when it was fused

    def _stages(self) -> frozenset[str]:
        return super()._stages() & named_once(self._eager_method.__func__)


def _is_cast(x: object) -> bool:
    return isinstance(x, Tensor) and autocast_dtype(x) not in (None, x.dtype)


def read_block(module: nn.Module, eager: type[nn.Module]) -> Known | None:
    """What the forward of its class says about a module; None where that is no residual block, or cannot be told."""
    tree = forward_text(eager) if _may_be_block(module) else None
    if tree is None:
        return None
    block = _Block(module, eager)
    try:
        layout = block.read(tree)
    except Unread:
        return None
    return Known(WrittenMixin, layout, conditions=tuple(dict.fromkeys(block.conditions)))


def read_stem(module: nn.Module, eager: type[nn.Module]) -> Known | None:
    """The first stem in the forward of a network, its modules called in turn; None where there is none, or not clearly.

    The forward may be all in another method, as torchvision has it.
    """
    if not any(map(is_norm, module._modules.values())) or not is_plain(eager):
        return None
    method = delegated_to(eager.forward) or "forward"
    function = getattr(eager, method, None)
    if function is None or was_replaced(eager, method):
        return None
    for chain in chains_of_calls(function):
        names = [call.name for call in chain]
        for place in range(len(names) - 2):
            layout = _stem_of(module, eager, names[place : place + 4])
            if layout is not None:
                return Known(WrittenNetworkMixin, layout, method)
    return None


def _stem_of(module: nn.Module, eager: type[nn.Module], names: list[str]) -> StemLayout | None:
    """The stem of a network whose forward calls the modules of these names; "" is a ReLU that is a function."""
    found = [None if hasattr(eager, name) else module._modules.get(name) for name in names]
    *are_alike, ends_in_relu = alike(*found[:3])
    if not all(are_alike) or not (ends_in_relu or names[2] == ""):
        return None
    return StemLayout(*names if isinstance(found[-1], POOLS) else names[:3])


def _without_relu(function: FunctionType, layout: StemLayout) -> FunctionType | None:
    """A network's method without the ReLU that is a function, which its stem has; None where that cannot be told."""
    for chain in chains_of_calls(function):
        for call, after in itertools.pairwise(chain):
            if call.name == layout.bn and after.name == "":
                return without(function, after)
    return None


def _may_be_block(module: nn.Module) -> bool:
    """Whether it holds as many convolutions and norms as a block does, at most: few texts have to be read."""
    held = list(itertools.islice(module.modules(), 30))
    convs, norms = sum(isinstance(child, _ConvNd) for child in held), sum(map(is_norm, held))
    return 2 <= convs <= 6 and 2 <= norms <= 4


@dataclass(eq=False)
class _Value:
    """What a forward has computed: by one of its modules, by a ReLU or a sum, or its input."""

    what: str  # input, module, gate, relu, sum
    of: tuple[_Value, ...] = ()
    name: str = ""  # of the module, or of a ReLU that is one
    module: nn.Module | None = None


@dataclass
class _Forward:
    """Follows the text of a forward with what its module holds, or that of a function in it."""

    block: _Block
    module: nn.Module
    cls: type[nn.Module]  # the module's, before it was fused
    prefix: str  # of the module's names in the block: none, or one with a dot
    function: FunctionType
    me: str | None  # the module's name in the text
    values: dict[str, _Value]
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)

    def run(self, body: list[ast.stmt]) -> _Value | None:
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
                case ast.AugAssign(ast.Name(name), ast.Add(), value):
                    if self.values.get(name, self.block.input) is self.block.input:  # the caller's tensor would change
                        raise Unread
                    self.values[name] = self.sum(self.values[name], self.value(value))
                case ast.If(test, then, otherwise):
                    returned = self.run(then if self.holds(test) else otherwise)
                    if returned is not None:
                        return returned
                case ast.FunctionDef(name) if name != self.me:
                    self.values.pop(name, None)
                    self.functions[name] = statement
                case ast.Expr(ast.Constant()):
                    pass
                case _:
                    raise Unread
        return None

    def returned(self, body: list[ast.stmt]) -> _Value:
        value = self.run(body)
        if value is None:
            raise Unread
        return value

    def value(self, expression: ast.expr) -> _Value:
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
                return self.call(name, self.module._modules.get(name), self.value(argument))
            case ast.Call(called, [left, right], []) if resolved(called, self.function) is torch.add:
                return self.sum(self.value(left), self.value(right))
            case _ if (argument := relu_argument(expression, self.function)) is not None:
                return self.block.make("relu", self.value(argument))
        raise Unread

    def sum(self, *of: _Value) -> _Value:
        if self.prefix:  # what the module holds is a block then
            raise Unread
        return self.block.make("sum", *of)

    def inner(self, function: ast.FunctionDef, argument: _Value) -> _Value:
        """What a function in the forward returns. It sees the module, and no other value of the forward."""
        made, names = function_in(self.function, function), [each.arg for each in function.args.args]
        if made is None or len(names) != 1 or names == [self.me]:
            raise Unread
        me = self.me if self.me in made.__code__.co_freevars else None
        values = dict(zip(names, [argument]))
        return replace(self, function=made, me=me, values=values, functions={}).returned(function.body)

    def call(self, name: str, module: object, of: _Value) -> _Value:
        kind, place = type(module), self.prefix + name
        if is_sequence(kind) and "forward" not in vars(module):
            self.block.containers[place] = kind
            inside = _Forward(self.block, module, kind, f"{place}.", kind.forward, None, {})
            for key, child in module._modules.items():
                of = inside.call(key, child, of)
            return of
        if kind is nn.Identity:
            self.block.idle.append(place)
            return of
        if kind is nn.ReLU:
            return self.block.make("relu", of, name=place)
        if isinstance(module, (_ConvNd, nn.AvgPool2d)) or is_norm(module):
            return self.block.make("module", of, name=place, module=module)
        if isinstance(module, nn.Module) and (is_attention(module) or read_gate(kind)):
            return self.block.make("gate", of, name=place, module=module)
        tree = forward_text(kind) if isinstance(module, nn.Module) else None
        if tree is None or "forward" in vars(module):
            raise Unread
        self.block.containers[place] = kind
        me, argument = kind.forward.__code__.co_varnames[:2]
        inside = _Forward(self.block, module, kind, f"{place}.", kind.forward, me, {argument: of})
        return inside.returned(tree.body)

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
        return self.note(test, is_none=False)

    def note(self, attribute: ast.expr, is_none: bool) -> bool:
        name = self.own(attribute)
        value = None if name is None else getattr(self.module, name)
        if name is None or not isinstance(value, (nn.Module, bool, int, str, type(None))):
            raise Unread
        answer = value is None if is_none else bool(value)
        self.block.conditions.append(Condition(self.prefix + name, is_none, answer))
        return answer

    def own(self, expression: ast.expr) -> str | None:
        """NAME of `self.NAME`, where that is the module's own and not its class's."""
        match expression:
            case ast.Attribute(ast.Name(me), name) if me == self.me:
                asked = alias(self.cls, name)
                if asked is not None and isinstance(found := vars(self.module).get(asked), str):
                    self.block.conditions.append(Equal(self.prefix + asked, found))
                    name = found
                places = vars(self.module), self.module._modules
                known = sum(name in place for place in places) == 1 and not hasattr(self.cls, name)
                return name if known else None
        return None


@dataclass
class _Block:
    """What the forward of a block does."""

    module: nn.Module
    eager: type[nn.Module]
    input: _Value = field(default_factory=lambda: _Value("input"))
    made: list[_Value] = field(default_factory=list)
    conditions: list[Condition | Equal] = field(default_factory=list)
    containers: dict[str, type[nn.Module]] = field(default_factory=dict)  # that were called, and of which class
    idle: list[str] = field(default_factory=list)  # identities that were called

    def read(self, tree: ast.FunctionDef) -> BlockLayout:
        forward = self.eager.forward
        me, argument = forward.__code__.co_varnames[:2]
        followed = _Forward(self, self.module, self.eager, "", forward, me, {argument: self.input})
        return self.layout(followed.returned(tree.body))

    def make(self, what: str, *of: _Value, name: str = "", module: nn.Module | None = None) -> _Value:
        value = _Value(what, of, name, module)
        self.made.append(value)
        return value

    def layout(self, result: _Value) -> BlockLayout:
        """Where the modules of the block are that gives this."""
        if result.what != "relu" or result.of[0].what != "sum":
            raise Unread
        for main, branch in itertools.permutations(map(self.steps, result.of[0].of)):
            gates = [step for step in main if step.what == "gate"]
            if len(main) - len(gates) in (5, 8) and len(branch) <= 3:
                break
        else:
            raise Unread
        before_gate = len(main) if not gates else main.index(gates[0])
        main = [step for step in main if step not in gates]
        if len(gates) > 1 or before_gate not in (len(main) - 2, len(main)):
            raise Unread
        convs, norms, relus = main[::3], main[1::3], main[2::3]
        # Each value is read once: nothing is computed beside, and nothing that was changed in place is read again.
        names = [value.name for value in self.made if value.what == "module"]
        if len(main) + len(gates) + len(branch) + 2 != len(self.made) or len({*names}) != len(names):
            raise Unread
        if not (all(map(_is_conv, convs)) and all(map(_is_norm, norms)) and all(step.what == "relu" for step in relus)):
            raise Unread
        shortcut, shortcut_norm, shortcut_class = self.shortcut(branch)
        place = (before_gate + 1) // 3 if gates else 0
        if gates and (place < 2 or shortcut_norm):  # no operator ends sooner, and a shortcut is called as one module
            raise Unread
        gate = {"gate": gates[0].name, "place": place, "attention": _read(gates[0])} if gates else {}
        return BlockLayout(
            units=tuple((conv.name, norm.name) for conv, norm in zip(convs, norms, strict=True)),
            relus=tuple(step.name for step in (*relus, result)),
            shortcut=shortcut,
            shortcut_norm=shortcut_norm,
            optional=tuple(name for name in self.idle if name != shortcut and not self.is_inside(name)),
            containers=tuple(
                (name, kind) for name, kind in self.containers.items() if not f"{name}.".startswith(f"{shortcut}.")
            ),
            shortcut_class=shortcut_class,
            **gate,
        )

    def steps(self, value: _Value) -> list[_Value]:
        """What was done to the input, one after the other."""
        found = []
        while value is not self.input:
            if value.what == "sum":
                raise Unread
            found.insert(0, value)
            (value,) = value.of
        return found

    def shortcut(self, steps: list[_Value]) -> tuple[str, str, type[nn.Module]]:
        """The name of the module that is the shortcut, and of its norm where that lies beside it; "" for none.

        The third is the class of what holds its convolution, or of the container in it that does.
        """
        if not steps:
            idle = [
                name for name in (*self.containers, *self.idle) if not self.is_inside(name) and not self.holds_any(name)
            ]
            name = next(iter(idle), "")
            return name, "", self.containers.get(name, nn.Sequential)
        if any(step.what != "module" for step in steps):
            raise Unread
        outer, *inner = sorted({step.name.rpartition(".")[0] for step in steps})
        if {outer, *inner} <= {*self.containers} and [name.rpartition(".")[0] for name in inner] in ([], [outer]):
            if not all(self.calls_its_children(name, steps) for name in (outer, *inner)):
                raise Unread
            return outer, "", self.containers[(outer, *inner)[-1]]
        conv, *norm = steps
        if self.is_inside(conv.name) or not _is_conv(conv) or len(norm) > 1 or not all(map(_is_norm, norm)):
            raise Unread
        return conv.name, norm[0].name if norm else "", nn.Sequential

    def calls_its_children(self, name: str, steps: list[_Value]) -> bool:
        """Whether a container calls what it holds in its order, as a sequence does."""
        held = {f"{name}.{key}": child for key, child in held_at(self.module, name)._modules.items()}
        called = [step.name for step in steps if step.name in held]
        names = [place for place, child in held.items() if type(child) not in (nn.Identity, type(None))]
        return is_sequence(self.containers[name]) or names == called

    def is_inside(self, name: str) -> bool:
        """Whether it is a module of a container that was called."""
        return name.rpartition(".")[0] in self.containers

    def holds_any(self, name: str) -> bool:
        """Whether something in a module of this name was called."""
        return any(value.name.startswith(f"{name}.") for value in self.made)


def _read(gate: _Value) -> tuple[type[nn.Module], Attention] | None:
    kind = type(gate.module)
    return None if is_attention(gate.module) else (kind, read_gate(kind))


def _is_conv(value: _Value) -> bool:
    return isinstance(value.module, _ConvNd)


def _is_norm(value: _Value) -> bool:
    return is_norm(value.module)
