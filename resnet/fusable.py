"""Which modules a fused operator may take the place of: why not, and the state that this depends on."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair

from resnet.norm import VECTORS
from resnet.operands import Geometry

# ---- the modules -------------------------------------------------------------------------------------------------


class UnitParts(NamedTuple):
    """The modules of a convolution and its BatchNorm, and their names in the `state_dict`."""

    conv: nn.Module | None
    bn: nn.Module | None  # None: a shortcut's convolution without a norm
    conv_name: str
    bn_name: str = ""


class Watched(NamedTuple):
    """A module that a fused operator takes the place of, without a parameter: a ReLU, an Identity, a container."""

    name: str
    module: nn.Module | None
    kind: type[nn.Module]  # what it has to be, exactly


class GateParts(NamedTuple):
    """Squeeze-and-excitation in a block. What makes gates of each image's means is called as it is, one by one."""

    watched: tuple[Watched, ...]  # the module, and its pool where it has one
    called: tuple[nn.Module, ...]
    unset: tuple[str, ...]  # attributes of the module that have to be false
    given: tuple[str, ...]  # and those that have to be true
    means: str  # what they are called on: see `Attention`
    place: int  # how many units precede it: all, or all but one
    shortcut: nn.Module | None  # of the block, called as it is; None: the identity


class BlockParts(NamedTuple):
    """The modules of a residual block."""

    units: tuple[UnitParts, ...]  # 2 or 3
    shortcut: UnitParts | None  # None: the identity
    others: tuple[Watched, ...] = ()
    pool: Watched | None = None  # which the shortcut's convolution follows
    gate: GateParts | None = None  # with one, the shortcut is its own


class PreActivationParts(NamedTuple):
    """The modules of a residual block whose norms and ReLUs precede its convolutions."""

    bn: nn.Module | None  # that of the input
    bn_name: str
    units: tuple[UnitParts, ...]  # 2 or 3: each convolution with the norm after it, which the last one has not
    shortcut: UnitParts | None  # None: the identity
    activated: bool  # whether the shortcut's convolution reads what the first norm and ReLU give, and not the input
    others: tuple[Watched, ...] = ()


class StemParts(NamedTuple):
    """The modules of a stem."""

    unit: UnitParts
    pool: Watched | None  # None: there is no pool, and the convolution is left to PyTorch
    others: tuple[Watched, ...] = ()
    before: tuple[UnitParts, ...] = ()  # of a deep stem: the units before it


# ---- why not -----------------------------------------------------------------------------------------------------

_KINDS = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Identity,
    nn.Sequential,
)
_FORWARD = {kind: kind.forward for kind in _KINDS}
_CONV_FORWARD = nn.Conv2d._conv_forward


# Norms of constants, which are buffers. None of these libraries is imported.
_FROZEN_IN_ANY_TYPE = "detectron2.layers.batch_norm.FrozenBatchNorm2d"  # gives its input's, as BatchNorm2d does
_FROZEN = {"torchvision.ops.misc.FrozenBatchNorm2d", _FROZEN_IN_ANY_TYPE} | {
    f"transformers.models.{model}.modeling_{model}.{name}FrozenBatchNorm2d"
    for model, name in (
        ("conditional_detr", "ConditionalDetr"),
        ("dab_detr", "DabDetr"),
        ("d_fine", "DFine"),
        ("deformable_detr", "DeformableDetr"),
        ("deimv2", "Deimv2"),
        ("detr", "Detr"),
        ("grounding_dino", "GroundingDino"),
        ("mm_grounding_dino", "MMGroundingDino"),
        ("pp_doclayout_v2", "PPDocLayoutV2"),
        ("pp_doclayout_v3", "PPDocLayoutV3"),
        ("pp_doclayout_v4", "PPDocLayoutV4"),
        ("rt_detr", "RTDetr"),
        ("rt_detr_v2", "RTDetrV2"),
        ("table_transformer", "TableTransformer"),
    )
}


class Attention(NamedTuple):
    """A class of modules that multiply each map with a gate, which they make of the means of all maps."""

    called: tuple[str, ...]  # what they call on the means, in its order: modules, or of `_FUNCTIONS`
    pool: str = ""  # what takes the means, where it is a module
    unset: tuple[str, ...] = ()  # attributes with which they would do something else
    means: str = "map"  # (N, C, 1, 1); or "row", (N, 1, C); or "matrix", (N, C)
    given: tuple[str, ...] = ()  # attributes without which they would do something else


_FUNCTIONS = {"relu()": nn.ReLU(), "sigmoid()": nn.Sigmoid()}


_ATTENTION = {
    "resnet.reference.SqueezeExcite": Attention(("fc1", "act", "fc2", "gate")),
    "timm.layers.squeeze_excite.SEModule": Attention(("fc1", "bn", "act", "fc2", "gate"), unset=("add_maxpool",)),
    "timm.layers.squeeze_excite.EffectiveSEModule": Attention(("fc", "gate"), unset=("add_maxpool",)),
    "timm.layers.eca.EcaModule": Attention(("conv", "gate"), unset=("conv2",), means="row"),
    "torchvision.ops.misc.SqueezeExcitation": Attention(
        ("fc1", "activation", "fc2", "scale_activation"), pool="avgpool"
    ),
    "transformers.models.regnet.modeling_regnet.RegNetSELayer": Attention(("attention",), pool="pooler"),
}


CONV_WITH_NORM = "detectron2.layers.wrappers.Conv2d"  # a Conv2d, then its children: a norm, an activation
NORM_WITH_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"  # a BatchNorm2d, then its children: a drop, an activation


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def was_replaced(cls: type, method: str) -> bool:
    """Whether a class has another method than the one in its definition, or one that takes more than `self` and x.

    What is wrapped does more than its text.
    """
    definer = next(base for base in cls.__mro__ if method in vars(base))
    found = vars(definer)[method]
    return (
        not isinstance(found, FunctionType)
        or (found.__module__, found.__qualname__) != (definer.__module__, f"{definer.__qualname__}.{method}")
        or hasattr(found, "__wrapped__")
        or (found.__code__.co_argcount, found.__code__.co_kwonlyargcount) != (2, 0)
        or found.__code__.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS) != 0
    )


def is_plain(cls: type[nn.Module]) -> bool:
    """Whether calling a module of a class does what its forward says, on the attributes that it has."""
    usual = ("__call__", "__getattr__", "__getattribute__", "_call_impl", "_wrapped_call_impl")
    return all(getattr(cls, name) is getattr(nn.Module, name) for name in usual) and not was_replaced(cls, "forward")


def is_sequence(cls: type[nn.Module]) -> bool:
    """Whether a class is `nn.Sequential`, or one that is derived from it and calls its modules as it does."""
    as_it_does = issubclass(cls, nn.Sequential) and all(
        getattr(cls, name) is getattr(nn.Sequential, name) for name in ("forward", "__iter__")
    )
    return as_it_does and is_plain(cls)


def is_frozen(norm: nn.Module | None) -> bool:
    """Whether a norm is exactly of a class whose statistics are constants, as torchvision's `FrozenBatchNorm2d`."""
    return full_name(type(norm)) in _FROZEN and is_as_written(type(norm))


def is_as_written(kind: type[nn.Module]) -> bool:
    """Whether a class of another library has the forward of its definition. That is remembered, to tell a later one."""
    if kind not in _FORWARD and not was_replaced(kind, "forward"):
        _FORWARD[kind] = kind.forward
    return kind in _FORWARD


# What torch.compiler.assume_constant_result sets: dynamo compares the names of a function otherwise.
is_as_written._dynamo_marked_constant = True


def is_norm(module: nn.Module | None) -> bool:
    return isinstance(module, _BatchNorm) or is_frozen(module)


def is_attention(module: object) -> bool:
    return full_name(type(module)) in _ATTENTION


def gate_parts(
    name: str,
    module: object,
    place: int,
    shortcut: nn.Module | None,
    read: tuple[type[nn.Module], Attention] | None = None,
) -> GateParts | None:
    """The parts of squeeze-and-excitation after `place` units; None where the module is of no class that is known.

    `read` is a class that nobody has listed, and what its text says of it.
    """
    kind = type(module)
    known = read[1] if read and kind is read[0] else _ATTENTION.get(full_name(kind))
    if known is None or not is_as_written(kind):
        return None
    own = module._modules
    called = tuple(own.get(each, _FUNCTIONS.get(each)) for each in known.called)
    if None in called:
        return None
    watched = Watched(name, module, kind)
    pools = (Watched(f"{name}.{known.pool}", own.get(known.pool), nn.AdaptiveAvgPool2d),) if known.pool else ()
    return GateParts((watched, *pools), called, known.unset, known.given, known.means, place, shortcut)


def gate_state(gate: GateParts) -> tuple:
    """All that fusing asks of squeeze-and-excitation, but for what is called as it is."""
    (_, module, _), *pools = gate.watched
    return (
        gate.place,
        gate.shortcut is None,
        *module_state(module),
        *[getattr(module, name, None) for name in (*gate.unset, *gate.given)],
        *[(module_state(pool), getattr(pool, "output_size", None)) for _, pool, _ in pools],
    )


def unfusable_gate(gate: GateParts) -> str | None:
    """Why squeeze-and-excitation cannot be fused."""
    reason, ((name, module, _), *pools) = unfusable_other(gate.watched), gate.watched
    for field in gate.unset:
        if value := getattr(module, field, None):
            found = f"a {type(value).__name__}" if isinstance(value, nn.Module) else value
            reason = reason or f"{name}.{field} is {found}"
    for field in gate.given:
        if not (value := getattr(module, field, None)):
            reason = reason or f"{name}.{field} is {value}"
    for pool_name, pool, _ in pools:
        if getattr(pool, "output_size", None) not in (1, (1, 1)):
            reason = reason or f"{pool_name}.output_size is {getattr(pool, 'output_size', None)}, not 1"
    return reason


def passed_over(module: nn.Module) -> str | None:
    """What a call of a submodule would run and a fused operator would not, such as hooks; None for nothing."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "hooks"
    own, kind = module.__dict__, type(module)
    if (
        "forward" in own
        or "_conv_forward" in own
        or ("_compiled_call_impl" in own and own["_compiled_call_impl"] is not None)
        or (kind in _FORWARD and kind.forward is not _FORWARD[kind])
        or (kind is nn.Conv2d and kind._conv_forward is not _CONV_FORWARD)
    ):
        return "a forward of its own"
    return None


def unfusable(name: str, module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a submodule cannot be fused: it is not exactly of its kind (a subclass may do anything), or is watched."""
    if type(module) is not kind:
        got, expected = type(module).__name__, kind.__name__
        if got == expected:
            got, expected = (f"{k.__module__}.{k.__qualname__}" for k in (type(module), kind))
        return f"{name} is a {got}, not a {expected}"
    for method in ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",):
        getattr(module, method)  # for torch.compile, which guards what is read and not what is looked for in `__dict__`
    found = passed_over(module)
    return None if found is None else f"{name} has {found}, which a fused operator would not call"


def unfusable_norm(name: str, bn: nn.Module, others: tuple[Watched, ...]) -> str | None:
    """Why a norm cannot be fused: it is of no class whose semantics are known, or watched.

    One that holds an activation has to be among the `others`, with which its children are.
    """
    kind = type(bn)
    known = kind is nn.SyncBatchNorm or is_frozen(bn)
    if not known and full_name(kind) == NORM_WITH_ACTIVATION:
        known = any(other.module is bn for other in others) and is_as_written(kind)
    return unfusable(name, bn, kind if known else nn.BatchNorm2d)


def unlike_input(name: str, bn: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a norm of constants would not keep its input's type: its product and sum promote it to its buffers'."""
    if is_frozen(bn) and full_name(type(bn)) != _FROZEN_IN_ANY_TYPE:
        for field in VECTORS[:4]:
            vector = getattr(bn, field)
            if vector.dtype != dtype:
                return f"{name}.{field} is {vector.dtype}, to which {type(bn).__name__} promotes an input of {dtype}"
    return None


def _both(value: object, expected: int | None) -> tuple:
    """What a setting along H and W should be. The constructor makes a pair of a number; a user may set one later."""
    if expected is not None:
        return expected, expected
    return tuple(value[:1]) * 2 if isinstance(value, (tuple, list)) and value else (value, value)


def unfusable_as_conv(name: str, conv: nn.Module, others: tuple[Watched, ...]) -> str | None:
    """Why a module cannot be fused as a convolution of whatever settings.

    One that holds its norm has to be among the `others`, with which its children are.
    """
    kind = type(conv)
    known = full_name(kind) == CONV_WITH_NORM and any(other.module is conv for other in others)
    return unfusable(name, conv, kind if known else nn.Conv2d)


def unfusable_conv(
    name: str,
    conv: nn.Module,
    others: tuple[Watched, ...],
    kernel: int | None = None,
    padding: int | None = None,
    stride: int | None = None,
) -> str | None:
    """Why a convolution cannot be fused; None accepts any setting that is the same along H and W."""
    return unfusable_as_conv(name, conv, others) or _other_setting(
        name,
        conv,
        kernel_size=_both(conv.kernel_size, kernel),
        padding=_both(conv.padding, padding),
        stride=_both(conv.stride, stride),
        dilation=(1, 1),
        groups=1,
    )


def unfusable_unit(name: str, conv: nn.Module, others: tuple[Watched, ...]) -> str | None:
    """Why a convolution of a block's chain cannot be fused: it is 1x1, or 3x3 of any dilation and groups.

    Its map has as many pixels as its input has, or every stride-th.
    """
    if getattr(conv, "kernel_size", None) == (1, 1):
        return unfusable_conv(name, conv, others, 1, 0)
    reason = unfusable_as_conv(name, conv, others)
    if reason is not None:
        return reason
    dilation, grouped = _both(conv.dilation, None), _is_count(conv.groups)
    if not all(map(_is_count, dilation)):  # PyTorch's error is the one to raise
        dilation = 1, 1
    return _other_setting(
        name,
        conv,
        kernel_size=(3, 3),
        padding=dilation,
        stride=_both(conv.stride, None),
        dilation=dilation,
        groups=conv.groups if grouped else 1,
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _other_setting(name: str, conv: nn.Conv2d, **expected: object) -> str | None:
    """Which setting of a convolution is another one than expected."""
    for field, value in {**expected, "padding_mode": "zeros"}.items():
        if getattr(conv, field) != value:
            return f"{name}.{field} is {getattr(conv, field)}, not {value}"
    return None


def unfusable_average(name: str, pool: nn.Module) -> str | None:
    """Why an average pool cannot be fused."""
    reason = unfusable(name, pool, nn.AvgPool2d)
    if reason is not None:
        return reason
    square = {field: len({*_pair(getattr(pool, field))}) == 1 for field in AVERAGE[:2]}
    unset = {field: getattr(pool, field) in (0, (0, 0), None) for field in AVERAGE[2:]}
    wrong = next((field for field, fits in (square | unset).items() if not fits), None)
    return None if wrong is None else f"{name}.{wrong} is {getattr(pool, wrong)}"


AVERAGE = ("kernel_size", "stride", "padding", "divisor_override")
_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")


def unfusable_pool(name: str, pool: nn.Module) -> str | None:
    reason = unfusable(name, pool, nn.MaxPool2d)
    if reason is not None:
        return reason
    expected = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    for field in _POOL:
        if getattr(pool, field) != getattr(expected, field):
            return f"{name}.{field} is {getattr(pool, field)}, not {getattr(expected, field)}"
    return None


def unfusable_other(others: tuple[Watched, ...]) -> str | None:
    for other in others:
        reason = unfusable(*other)
        if reason is not None:
            return reason
    return None


def geometry_of(conv: nn.Conv2d) -> Geometry:
    return conv.stride[0], conv.padding[0], conv.dilation[0]


# ---- what this depends on ----------------------------------------------------------------------------------------


def conv_state(conv: nn.Module | None) -> tuple:
    """All that fusing and checking ask of a convolution, its tensors aside."""
    kind = type(conv)
    if kind is not nn.Conv2d and not issubclass(kind, nn.Conv2d):
        return (kind,)
    own = conv.__dict__
    return (
        kind,
        own["in_channels"],
        own["out_channels"],
        own["kernel_size"],
        own["stride"],
        own["padding"],
        own["dilation"],
        own["groups"],
        own["padding_mode"],
        passed_over(conv),
    )


def pool_state(pool: nn.Module | None, fields: tuple[str, ...] = _POOL) -> tuple:
    """All that fusing asks of a pool, by default of a max-pool."""
    return (*module_state(pool), *[getattr(pool, field, None) for field in fields])


def average_of(pool: nn.AvgPool2d) -> tuple:
    """The size and the stride of an average pool: the size is the stride where that is None."""
    size, stride = _pair(pool.kernel_size)[0], _pair(pool.stride)[0]
    return size, size if stride is None else stride


def hashable(state: object) -> object:
    """A state whose lists are no longer lists: PyTorch's modules take one where they mean a tuple."""
    if type(state) is tuple:
        return tuple(map(hashable, state))
    return repr(state) if type(state) is list else state


def module_state(module: nn.Module | None) -> tuple:
    """All that fusing asks of another module."""
    return (None,) if module is None else (type(module), passed_over(module))
