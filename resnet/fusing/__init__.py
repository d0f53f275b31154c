"""`fuse` and `unfuse`: the residual blocks and stems of a finished model change their class for a fused one, and back.

Known are the ResNets and RegNets of torchvision, timm and transformers, none of which is imported, and this library's
own. The forward of a block of another class is read.
"""

from __future__ import annotations

import functools
from collections import Counter
from types import CodeType, FunctionType

from torch import nn
from torch.nn.modules.conv import _ConvNd

from resnet.fusable import full_name, is_as_written, is_norm, is_sequence, was_replaced
from resnet.fusing.blocks import BlockMixin, PreActivationMixin, StageMixin, blocks_of
from resnet.fusing.changed import Changed, kept_parts
from resnet.fusing.known import EAGER, OWN, STAGES, Known, eager_class, is_block, is_known, known
from resnet.fusing.layouts import classes_in, looked_up, places_of
from resnet.fusing.report import FuseItem, FuseReport
from resnet.fusing.sources import has_chain
from resnet.fusing.stems import (
    CutMixin,
    FoundMixin,
    GetterMixin,
    NetworkMixin,
    SequenceMixin,
    StemMixin,
    WithStem,
    begins_with_stem,
    first_names,
    given_inside,
    starts_with,
)
from resnet.fusing.written import WrittenNetworkMixin, read_block, read_stem
from resnet.sequential import FusedSequential, holds_blocks, linkable


def _calling(eager: FunctionType) -> FunctionType:
    """`_call_unless_replaced` in the place of an eager method, with its arguments' names and its text.

    TorchScript compiles the text. What it names is then taken from the function's globals, which are therefore the
    eager method's.
    """

    def method(self, x):
        return self._call_unless_replaced(x)

    code = method.__code__.replace(co_varnames=eager.__code__.co_varnames[:2])
    made = FunctionType(code, eager.__globals__, argdefs=eager.__defaults__)
    return functools.update_wrapper(made, eager)


def _fused_class(eager: type[nn.Module], entry: Known) -> type[nn.Module]:
    function = getattr(eager, entry.method)
    return _class_for(eager, entry, function, getattr(function, "__code__", None))


@functools.cache
def _class_for(eager: type[nn.Module], entry: Known, function: FunctionType, code: CodeType) -> type[nn.Module]:
    """The class for one that has this method, with this code."""
    mixin, layout, method, *_ = entry
    own: dict[str, object] = {"_known": entry}
    if mixin is not CutMixin:  # whose modules have names of their own
        own |= {"_layout": looked_up(eager, layout), "_places": places_of(layout)}
        for kind in classes_in(own["_layout"]):
            is_as_written(kind)  # remembers the forward, so that a later one is noticed
    if entry is not known(eager):
        own["_rebuild"] = staticmethod(functools.partial(_rebuild, entry=entry))
    cls = _derived(mixin, eager, method, **own)
    return linkable(cls) if issubclass(mixin, BlockMixin) else cls


@functools.cache
def _fused_stage_class(eager: type[nn.Module]) -> type[nn.Module]:
    return FusedSequential if eager is nn.Sequential else _derived(StageMixin, eager, "forward")


def _derived(mixin: type[Changed], eager: type[nn.Module], method: str, **others: object) -> type[nn.Module]:
    """The class that one is changed for; `others` are attributes beside those that each has."""
    own = {
        "__module__": __name__,
        "__doc__": f"A `{full_name(eager)}` that `resnet.fuse` has changed the class of.",
        "_eager_class": eager,
        "_eager_method": getattr(eager, method),
        "_eager_code": getattr(getattr(eager, method), "__code__", None),
        "_method": method,
        "_rebuild": staticmethod(_rebuild),
        method: _calling(getattr(eager, method)),
    }
    return type(f"{mixin._prefix}{eager.__name__}", (mixin, eager), own | others)


def _name_of_ours(module: nn.Module, eager: type[nn.Module], mixin: type[nn.Module]) -> str | None:
    """What a module has, or its class, by a name that the fused class has, and that may be anything's."""
    ours = {*dir(mixin), *Changed.__annotations__, *WithStem.__annotations__} - {*dir(nn.Module)}
    theirs = {*dir(eager), *vars(module), *module._modules, *module._parameters, *module._buffers}
    return min(ours & theirs, default=None)


def _rebuild(eager: type[nn.Module], entry: Known | None = None) -> nn.Module:
    """An empty fused module, which pickle and deepcopy fill; `entry` where its class is not known."""
    cls = _fused_stage_class(eager) if full_name(eager) in STAGES else _fused_class(eager, entry or known(eager))
    return cls.__new__(cls)


def _unlike_its_class(module: nn.Module, eager: type[nn.Module], entry: Known | None) -> str | None:
    """Why what a module computes cannot be told from its class."""
    if eager in OWN:
        return "it has a forward of its own" if "forward" in vars(module) else None
    mixin, layout, method, *_ = entry
    for name in {"forward", method}:
        if name in vars(module):
            return f"it has a {name} of its own"
    name = _name_of_ours(module, eager, mixin)
    if name is not None:
        return f"a fused module has a {name}, and so has this"
    for cls, name in ((eager, method), *((kind, "forward") for kind in classes_in(looked_up(eager, layout)))):
        if was_replaced(cls, name):
            return f"{full_name(cls)}.{name} was replaced"
    if mixin is CutMixin or known(eager) is None:
        return None
    name = next((name for name in layout.names if hasattr(eager, name.split(".")[0])), None)
    if name is not None:
        return f"{full_name(eager)} has a {name} of its own"
    if issubclass(mixin, SequenceMixin):
        names = first_names(module, layout)
        if not starts_with(module, names):
            return f"it does not begin with {', '.join(names)}"
        given = given_inside(module, names) if issubclass(mixin, GetterMixin) else None
        return None if given is None else f"it gives what {given} gives"
    if issubclass(mixin, NetworkMixin):
        names = ", ".join(layout.names)
        if not has_chain(getattr(eager, method), layout.names):
            return f"{full_name(eager)}.{method} does not call {names} in turn, and nowhere else"
        return None
    held = (*module._modules, *module._parameters, *module._buffers)
    other = next((name for name in held if name not in places_of(layout)), None)
    return None if other is None else f"its {other} is none that its class is known to have"


def _reason_not_to_fuse(module: nn.Module) -> str | None:
    """Why a module of a fused class runs PyTorch's operators."""
    parts = module._parts()
    return parts if isinstance(parts, str) else module._reason_not_to_fuse(parts)


def _read(module: nn.Module, eager: type[nn.Module], base: type[nn.Module] | None) -> Known | None:
    """What is known of a module by the text of its forward. One whose base is a known block is one, or nothing."""
    entry = read_block(module, eager)
    return entry if entry is not None or (base is not None and is_block(base)) else read_stem(module, eager)


def _fuse(module: nn.Module, eager: type[nn.Module], entry: Known | None) -> str | None:
    """Change the class of a module of which something is known, or say why not."""
    reason = _unlike_its_class(module, eager, entry)
    if reason is not None:
        return reason
    before = type(module)
    try:
        cls = OWN.get(eager) or _fused_class(eager, entry)
    except Exception as error:  # of what the class does where one is derived from it
        return f"no class can be derived from {full_name(eager)}: {error}"
    _become(module, cls)
    reason = _reason_not_to_fuse(module)
    if reason is not None:
        _become(module, before)
    return reason


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", cls)  # whatever a `__setattr__` of its own refuses


def _runs_its_blocks_in_turn(module: nn.Module) -> bool:
    """Whether a module is of an eager class that does nothing else, and holds fused blocks, or sequences of them."""
    kind = type(module)
    if (kind is not nn.Sequential and full_name(kind) not in STAGES) or "forward" in vars(module):
        return False
    return not was_replaced(kind, "forward") and holds_blocks(blocks_of(module))


def _recognised(module: nn.Module, eager: type[nn.Module], within: bool) -> tuple[type[nn.Module] | None, Known | None]:
    """The class that says what a module does, and what is known by it; of this library's own nothing has to be.

    The class is a known one that the module is of or derived from, or its own, if that can be read. Within a block or
    a stem nothing is read.
    """
    base = next(filter(is_known, eager.__mro__), None)
    if base is None and is_sequence(eager):
        return (eager, known(nn.Sequential)) if not within and begins_with_stem(module) else (None, None)
    listed = base, base and known(base)
    if within or base is eager or isinstance(module, (*EAGER,)):
        return listed
    entry = _read(module, eager, base)
    if isinstance(module, (BlockMixin, PreActivationMixin, StemMixin)):  # fused before, and perhaps to be read no more
        return module._eager_class, entry or module._known
    return listed if entry is None else (eager, entry)


def _is_block(module: nn.Module) -> bool:
    """Whether it is a residual block, one that may have to be left alone too."""
    eager = eager_class(type(module))
    return any(map(is_block, eager.__mro__)) or read_block(module, eager) is not None


def _calls_of_stem(module: nn.Module, entry: Known | None) -> tuple[str, ...]:
    """What a network that calls its stem itself calls for it; nothing for all else."""
    if entry is None or not issubclass(entry.mixin, NetworkMixin):
        return ()
    return tuple(module._modules)[:1] if entry.mixin is CutMixin else entry.called


def _normalizes(module: nn.Module) -> bool:
    """Whether it holds a convolution and a norm, beside those of a stem that was fused."""
    sliced = isinstance(module, CutMixin) and len(module._modules) < 3
    of_stem = module._layout.names if isinstance(module, StemMixin) and not sliced else ()
    children = [child for name, child in module._modules.items() if name not in of_stem]
    return any(isinstance(child, _ConvNd) for child in children) and any(map(is_norm, children))


def fuse(model: nn.Module) -> FuseReport:
    """Let the residual blocks and stems in a model run as fused operators from now on; in place.

    A fused module keeps all that it has: parameters and buffers, and so the `state_dict` and an optimizer's state, and
    hooks, modes, device and type. Its class becomes one that is derived from its own. It can be pickled and copied;
    whoever reads it needs this library. For a fused copy call `copy.deepcopy` first: a choice between the two here
    would have `fuse` return now a model and now a report.

    Known are this library's blocks and stems, those of the ResNets of torchvision, timm and transformers, RT-DETR's
    too, and those of their RegNets; and an `nn.Sequential` that is a stem or begins with one, as it does where a
    network was cut up by `children()`, or one of a class that is derived from it and adds nothing. A block may have
    squeeze-and-excitation: timm's `SEModule`, `EffectiveSEModule` and `EcaModule` after its last norm, and what
    RegNetYs have before the last convolution. Where a network calls the modules of its stem itself, it is the network
    that changes its class. An `nn.Sequential` of blocks becomes a `FusedSequential`, and the classes of stages that
    these libraries have become such, too; the report does not name them.

    A block of another class is fused where the text of its forward says that it is one: d2l.ai's `Residual`, say, those
    of OpenMMLab, detectron2 and pytorchcv, or one with pre-activation. Its calls, sums and conditions are read, those
    of its units too, and what is not understood leaves it alone. So is squeeze-and-excitation, and a convolution, norm
    and ReLU that a forward calls in turn: the stem of a network, the first one with a max-pool or the first. In a model
    without blocks these are fused in channels_last alone, where no pool follows, so that they give the layout that
    eager gives; on a CPU they gain nothing and PyTorch's operators run.

    A module stays as it is where it might compute something else than the operator: with another activation or norm,
    another attention, stochastic depth, anti-aliasing, hooks on what is inside, or a class that is derived from a known
    one and has a forward that is not understood.

    A second call changes nothing, and its report is the same.

    Args:
        model: any module; one block alone will do.

    Returns:
        What was fused, and what was not and why. Print it.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module("fuse", model)
    kept_parts.clear()
    fused, left, unknown = [], [], Counter()
    has_blocks = any(map(_is_block, model.modules()))
    inside: tuple[str, ...] = ()  # the blocks and what stems lie in, whose submodules are theirs
    for name, module in model.named_modules():
        eager = eager_class(type(module))
        within = f"{name}.".startswith(inside)
        base, entry = _recognised(module, eager, within)
        if entry is not None and issubclass(entry.mixin, FoundMixin) and not has_blocks:
            entry = entry._replace(keeps_layout=True)
        if base is None:
            if _normalizes(module) and not within:
                unknown[full_name(eager)] += 1
            continue
        if base is eager:
            reason = _fuse(module, eager, entry)
        elif isinstance(module, (Changed, *EAGER)):  # derived from a fused one, as by a tool that changes classes
            reason = _reason_not_to_fuse(module)
        else:
            reason = f"it is derived from {full_name(base)} and may compute something else"
        stem, prefix = _calls_of_stem(module, entry), f"{name}." if name else ""
        (fused if reason is None else left).append(FuseItem(name, full_name(eager), reason, stem != ()))
        if reason is None and entry is not None and entry.mixin is WrittenNetworkMixin and _normalizes(module):
            unknown[full_name(eager)] += 1  # what else it does was not read
        inside += tuple(f"{prefix}{call}." for call in stem) if stem else (prefix,)
    for module in reversed(list(model.modules())):  # what holds others comes after these
        if _runs_its_blocks_in_turn(module):
            _become(module, _fused_stage_class(type(module)))
    return FuseReport(tuple(fused), tuple(left), dict(unknown))


def unfuse(model: nn.Module) -> None:
    """Give all modules in a model that `fuse` has changed their own class back; `FusedResidual` becomes `Residual`.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module("unfuse", model)
    kept_parts.clear()
    for module in model.modules():
        eager = eager_class(type(module))
        if eager is not type(module):
            _become(module, eager)


def _check_module(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got a {type(model).__name__}")
