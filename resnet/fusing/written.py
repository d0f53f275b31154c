"""Blocks and stems that somebody wrote: a forward whose text says that it is one, or that it has one.

With anything in it that is not understood a module is left alone.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resnet.fusable import (
    Attention,
    BlockParts,
    PreActivationParts,
    is_attention,
    is_norm,
    is_plain,
    is_sequence,
    unfusable_pool,
    was_replaced,
)
from resnet.fused.module import autocast_dtype
from resnet.fusing.blocks import BlockMixin, PreActivationMixin
from resnet.fusing.changed import Changed
from resnet.fusing.following import Followed, Forward, Value
from resnet.fusing.gates import read_gate
from resnet.fusing.known import Known
from resnet.fusing.layouts import BlockLayout, Condition, Equal, StemLayout, held_at
from resnet.fusing.sources import (
    Call,
    Unread,
    chains_of_calls,
    delegated_to,
    forward_text,
    listed_in,
    named_once,
    reads_by_name,
    times_named,
    without,
)
from resnet.fusing.stems import POOLS, FoundMixin


class _Written(Changed):
    """A block of a class that nobody has listed."""

    def _find_parts(self) -> BlockParts | PreActivationParts | str:
        called = filter(None, (*self._layout.optional, self._layout.shortcut))
        gone = next((name for name in called if held_at(self, name) is None), None)
        return super()._find_parts() if gone is None else f"{gone} is None, and is called"

    def _call(self, x: Tensor) -> Tensor:
        if not all(condition.holds(self) for condition in self._known.conditions):
            parts = "its forward takes another way than it did when it was fused"
        else:
            parts = self._parts()
            if type(parts) is not str and parts.shortcut is None and _is_cast(x):
                parts = f"autocast leaves the input {x.dtype}, which is added"
        return self._run(x, parts)


class WrittenMixin(_Written, BlockMixin):
    """A residual block."""


class WrittenPreActivationMixin(_Written, PreActivationMixin):
    """A residual block with pre-activation."""


class WrittenNetworkMixin(FoundMixin):
    """A network of a class that nobody has listed, whose forward has a stem."""

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        if "_known" in vars(cls) and "" in (calls := cls._known.called):
            relu = _relu_after(cls._eager_method, calls[calls.index("") - 1])
            cls._around = None if relu is None else staticmethod(without(cls._eager_method, relu))

    def _call(self, x: Tensor) -> Tensor:
        as_read = all(condition.holds(self) for condition in self._known.conditions)
        if as_read and (self._around is not None or "" not in self._calls()):
            return super()._call(x)
        return self._eager_method(x)  # the module, or the text, is not what it was when it was fused

    def _calls(self) -> tuple[str, ...]:
        return self._known.called

    def _stages(self) -> frozenset[str]:
        function = self._eager_method.__func__
        return frozenset() if reads_by_name(function) else super()._stages() & named_once(function)


def _is_cast(x: object) -> bool:
    return isinstance(x, Tensor) and autocast_dtype(x) not in (None, x.dtype)


def read_block(module: nn.Module, eager: type[nn.Module]) -> Known | None:
    """What the forward of its class says about a module; None where that is no residual block, or cannot be told."""
    tree = forward_text(eager) if _may_be_block(module) else None
    if tree is None:
        return None
    block = _Block(module)
    try:
        layout = block.read(eager, tree)
    except Unread:
        return None
    mixin = WrittenPreActivationMixin if layout.first_norm else WrittenMixin
    return Known(mixin, layout, conditions=tuple(dict.fromkeys(block.conditions)))


def read_stem(module: nn.Module, eager: type[nn.Module]) -> Known | None:
    """The stem in the forward of a network, its modules called in turn; None where there is none, or not clearly.

    It is the first one with a max-pool, or the first. The forward may be all in another method, as torchvision has it.
    """
    held = [child for child in module._modules.values() if child is not None]
    if not any(is_norm(each) for child in held for each in (child, *child._modules.values())) or not is_plain(eager):
        return None
    method = delegated_to(eager.forward) or "forward"
    function = getattr(eager, method, None)
    if function is None or was_replaced(eager, method):
        return None
    network = _Network(module, eager, function)
    found = [stem for chain in chains_of_calls(function, network.taken) for stem in network.stems_in(chain)]
    for stem in sorted(found, key=lambda stem: not _is_max(stem[-1].does[-1])):  # and in the order of the text
        calls, conditions = tuple(step.call.name for step in stem), network.conditions_of(stem)
        relu = calls.index("") if "" in calls else None
        if conditions is not None and (relu is None or _relu_after(function, calls[relu - 1]) is not None):
            return Known(WrittenNetworkMixin, _stem_layout(stem), method, conditions, calls=calls)
    return None


class _Step(NamedTuple):
    """A call in the forward of a network."""

    call: Call
    record: Followed
    does: list[Value]  # convolutions, norms and ReLUs, one after the other; or a pool


class _Network:
    """The forward of a module that may call a stem."""

    def __init__(self, module: nn.Module, eager: type[nn.Module], function: FunctionType):
        self.module, self.eager, self.function = module, eager, function
        self.asked: dict[ast.If, tuple[bool | None, Followed]] = {}

    def follow(self) -> Forward:
        me, record = self.function.__code__.co_varnames[0], Followed(self.module)
        return Forward(record, self.module, self.eager, "", self.function, me, {})

    def taken(self, branches: ast.If) -> list[ast.stmt] | None:
        """The statements of an `if` that run, whatever the input is, in training and evaluation; None if unknown."""
        if branches not in self.asked:
            forward = self.follow()
            try:
                answer = forward.holds(branches.test)
            except Unread:
                answer = None
            if any(condition.name == "training" for condition in forward.record.conditions):
                answer = None
            self.asked[branches] = answer, forward.record
        answer, _ = self.asked[branches]
        return None if answer is None else branches.body if answer else branches.orelse

    def stems_in(self, chain: list[Call]) -> Iterator[list[_Step]]:
        """The parts of a chain that are stems: of those that begin with the same call the longest first."""
        steps = list(map(self.step, chain))
        for start in range(len(steps)):
            for end in range(min(start + 10, len(steps)), start + 1, -1):
                part = steps[start:end]
                if None not in part and _stem_layout(part) is not None:
                    yield part

    def step(self, call: Call) -> _Step | None:
        """None where what is called does something else."""
        forward = self.follow()
        record = forward.record
        if not call.name:
            return _Step(call, record, [record.make("relu", record.input)])
        name = forward.named(call.name)
        if name is None or (name != call.name and times_named(self.function)[name]):
            return None
        child = self.module._modules.get(name)
        if type(child) in POOLS and (type(child) is nn.Identity or unfusable_pool(name, child) is None):
            does = [record.make("pool", record.input, name=name, module=child)]
        else:
            try:
                does = record.steps(record.call(name, child, record.input))
            except Unread:
                return None
        # What it does beside is seen by nothing, but a norm counts it.
        return _Step(call, record, does) if does and len(does) == len(record.made) else None

    def conditions_of(self, stem: list[_Step]) -> tuple[Condition | Equal, ...] | None:
        """What has to hold for the network to call its stem so; None where that cannot be told."""
        conditions = [condition for step in stem for condition in step.record.conditions]
        first, last = min(step.call.node.lineno for step in stem), max(step.call.node.end_lineno for step in stem)
        for branches, (answer, record) in self.asked.items():
            apart = branches.end_lineno < first or last < branches.lineno
            around = branches.lineno <= first and last <= branches.end_lineno
            if answer is not None and not apart and not around:
                conditions += record.conditions
        names = {name for step in stem for name in (step.call.name, *(value.name.split(".")[0] for value in step.does))}
        for expression in reads_by_name(self.function):
            others = self.names_others(expression, names)
            if others is None:
                return None
            conditions += others
        return tuple(dict.fromkeys(conditions))

    def names_others(self, expression: ast.expr, names: set[str]) -> list[Equal] | None:
        """Under which conditions an expression is none of these names; None where it may be one."""
        match expression:
            case ast.Constant(str() as name) if name not in names:
                return []
            case ast.JoinedStr([ast.Constant(str() as start), *_]):
                return None if any(name.startswith(start) for name in names) else []
            case ast.Name(name):
                lists = {of: vars(self.module).get(of) for of in listed_in(self.function, name)}
                if lists and all(type(held) in (list, tuple) and names.isdisjoint(held) for held in lists.values()):
                    return [Equal(of, tuple(held)) for of, held in lists.items()]
        return None


def _stem_layout(steps: list[_Step]) -> StemLayout | None:
    """Where a stem's modules are: one convolution, its norm and ReLU, perhaps a pool; or three of each and a max-pool.

    None where the calls are no stem, or a single one that has it all: it is the stem then.
    """
    does = [value for step in steps for value in step.does]
    pool = does.pop() if does and does[-1].what == "pool" else None
    units = [does[at : at + 3] for at in range(0, len(does), 3)]
    if not all(map(_is_unit, units)) or len(units) not in ((1, 3) if _is_max(pool) else (1,)):
        return None
    if len(steps) - (pool is not None and not _is_max(pool)) < 2:
        return None
    *before, last = (tuple(value.name for value in unit) for unit in units)
    if "" in sum(before, ()):
        return None
    containers = tuple(item for step in steps for item in step.record.containers.items())
    return StemLayout(*last, pool.name if pool else "", containers, tuple(before))


def _is_unit(does: list[Value]) -> bool:
    return len(does) == 3 and _is_conv(does[0]) and _is_norm(does[1]) and does[2].what == "relu"


def _is_max(pool: Value | None) -> bool:
    return pool is not None and isinstance(pool.module, nn.MaxPool2d)


def _relu_after(function: FunctionType, name: str) -> Call | None:
    """The ReLU of a network's method that is a function and follows a module; None where that cannot be told."""
    for chain in chains_of_calls(function):
        for call, after in itertools.pairwise(chain):
            if call.name == name and after.name == "":
                return after
    return None


def _may_be_block(module: nn.Module) -> bool:
    """Whether it holds as many convolutions and norms as a block does, at most: few texts have to be read."""
    held = list(itertools.islice(module.modules(), 30))
    convs, norms = sum(isinstance(child, _ConvNd) for child in held), sum(map(is_norm, held))
    return 2 <= convs <= 6 and 2 <= norms <= 4


class _Block(Followed):
    """What the forward of a block does."""

    def read(self, eager: type[nn.Module], tree: ast.FunctionDef) -> BlockLayout:
        followed = Forward.of(self, self.module, eager, "", self.input)
        return self.layout(followed.returned(tree.body))

    def layout(self, result: Value) -> BlockLayout:
        """Where the modules of the block are that gives this."""
        last = result.itself
        if last.what == "sum":
            return self.pre_activation(last)
        if last.what != "relu" or (sum_ := last.of[0].itself).what != "sum":
            raise Unread
        for ends in itertools.permutations(sum_.of):
            main, branch = map(self.steps, ends)
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
        self.check_made((*main, *gates, *branch, sum_, last), convs, norms, relus)
        shortcut, shortcut_norm, shortcut_class = self.shortcut(branch, *ends)
        place = (before_gate + 1) // 3 if gates else 0
        if gates and (place < 2 or shortcut_norm):  # no operator ends sooner, and a shortcut is called as one module
            raise Unread
        gate = {"gate": gates[0].name, "place": place, "attention": _read(gates[0])} if gates else {}
        return BlockLayout(
            units=tuple((conv.name, norm.name) for conv, norm in zip(convs, norms, strict=True)),
            relus=tuple(step.name for step in (*relus, last)),
            shortcut=shortcut,
            shortcut_norm=shortcut_norm,
            shortcut_class=shortcut_class,
            **self.beside(shortcut, shortcut_norm),
            **gate,
        )

    def pre_activation(self, sum_: Value) -> BlockLayout:
        """Where the modules of the block are that gives this sum: each convolution's norm and ReLU precede it."""
        for ends in itertools.permutations(sum_.of):
            main, branch = map(self.steps, ends)
            activated = branch[:2] == main[:2]
            if len(main) in (6, 9) and len(branch) <= 3:
                break
        else:
            raise Unread
        norms, relus, convs = main[::3], main[1::3], main[2::3]
        branch = branch[2:] if activated else branch
        self.check_made((*main, *branch, sum_), convs, norms, relus)
        shortcut, norm, shortcut_class = self.shortcut(branch, *ends)
        if norm or (activated and not branch):
            raise Unread
        first, *after = (norm.name for norm in norms)
        return BlockLayout(
            units=tuple(zip((conv.name for conv in convs), (*after, ""))),
            relus=tuple(relu.name for relu in relus),
            shortcut=shortcut,
            shortcut_class=shortcut_class,
            first_norm=first,
            activated=activated,
            **self.beside(shortcut),
        )

    def check_made(self, read: Iterable[Value], convs: list[Value], norms: list[Value], relus: list[Value]) -> None:
        """Refuse what is computed beside these, or read again after a change in place, or not of its kind."""
        names = [value.name for value in self.made if value.what == "module"]
        if Counter(read) != Counter(self.made) or len({*names}) != len(names):
            raise Unread
        if not (all(map(_is_conv, convs)) and all(map(_is_norm, norms)) and all(step.what == "relu" for step in relus)):
            raise Unread

    def beside(self, shortcut: str, shortcut_norm: str = "") -> dict[str, tuple]:
        """What else a layout names: identities, and the containers of what is called."""
        return {
            "optional": tuple(name for name in self.idle if name != shortcut and not self.is_inside(name)),
            "containers": tuple(
                (name, kind)
                for name, kind in self.containers.items()
                if shortcut_norm or not f"{name}.".startswith(f"{shortcut}.")
            ),
        }

    def shortcut(self, steps: list[Value], main: Value, branch: Value) -> tuple[str, str, type[nn.Module]]:
        """The name of the module that is the shortcut, and of its norm where that lies beside it; "" for none.

        Without steps it is the first of those on its branch that gave what they were called on. The third is the class
        of what holds its convolution, or of the container in it that does.
        """
        if not steps:
            on_main, on_branch = self.idle_on(main), self.idle_on(branch)
            name = next((name for name in on_branch if name not in on_main and not self.is_inside(name)), "")
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

    def calls_its_children(self, name: str, steps: list[Value]) -> bool:
        """Whether a container calls what it holds in its order, as a sequence does."""
        held = {f"{name}.{key}": child for key, child in held_at(self.module, name)._modules.items()}
        called = [step.name for step in steps if step.name in held]
        names = [place for place, child in held.items() if type(child) not in (nn.Identity, type(None))]
        return is_sequence(self.containers[name]) or names == called

    def is_inside(self, name: str) -> bool:
        """Whether it is a module of a container that was called."""
        return name.rpartition(".")[0] in self.containers


def _read(gate: Value) -> tuple[type[nn.Module], Attention] | None:
    return None if is_attention(gate.module) else (type(gate.module), read_gate(gate.module))


def _is_conv(value: Value) -> bool:
    return isinstance(value.module, _ConvNd)


def _is_norm(value: Value) -> bool:
    return is_norm(value.module)
