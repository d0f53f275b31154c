"""Residual blocks, and the stages that hold them, of the known libraries."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resnet.fusable import BlockParts, PreActivationParts, UnitParts, Watched, gate_parts
from resnet.fused.block import FusedBlock
from resnet.fused.pre_activation import FusedPreActivation
from resnet.fusing.changed import Changed, children_of, no_module, watched_in
from resnet.fusing.layouts import held_at
from resnet.sequential import run_in_turn


class BlockMixin(Changed, FusedBlock):
    """A residual block."""

    _call = FusedBlock._run

    def _find_parts(self) -> BlockParts | str:
        layout = self._layout
        units = tuple(UnitParts(held_at(self, conv), held_at(self, bn), conv, bn) for conv, bn in layout.units)
        gate, attention = None, held_at(self, layout.gate) if layout.gate else None
        shortcut, others, pool = held_at(self, layout.shortcut), [], None
        if attention is not None and type(attention) is not nn.Identity:
            added = None if type(shortcut) is nn.Identity else shortcut
            gate = gate_parts(layout.gate, attention, layout.place, added, layout.attention)
        if gate is None:
            shortcut, others, pool = _shortcut(layout.shortcut, shortcut, layout.shortcut_class)
            if layout.shortcut_norm:
                if shortcut is None or shortcut.bn is not None:
                    return f"{layout.shortcut} is not one convolution"
                shortcut = shortcut._replace(bn=held_at(self, layout.shortcut_norm), bn_name=layout.shortcut_norm)
            if attention is not None:
                others.append(Watched(layout.gate, attention, nn.Identity))
        elif gate.shortcut is None and shortcut is not None:
            others.append(Watched(layout.shortcut, shortcut, nn.Identity))
        shortcut = None if gate is not None else shortcut
        others += _watched(self)
        return no_module(others) or BlockParts(units, shortcut, tuple(others), pool, gate)


class PreActivationMixin(Changed, FusedPreActivation):
    """A residual block with pre-activation."""

    def _find_parts(self) -> PreActivationParts | str:
        layout = self._layout
        units = tuple(UnitParts(held_at(self, conv), held_at(self, bn), conv, bn) for conv, bn in layout.units)
        shortcut, others, pool = _shortcut(layout.shortcut, held_at(self, layout.shortcut), layout.shortcut_class)
        if pool is not None or (shortcut is not None and shortcut.bn is not None):
            return f"{layout.shortcut} is not one convolution"
        if layout.activated and shortcut is None:
            return f"{layout.shortcut} adds what the first norm and ReLU give, not the input"
        others += _watched(self)
        bn = held_at(self, layout.first_norm)
        parts = PreActivationParts(bn, layout.first_norm, units, shortcut, layout.activated, tuple(others))
        return no_module(others) or parts


def _watched(block: BlockMixin | PreActivationMixin) -> list[Watched]:
    """The ReLUs of a block, what has to be identities in it, and its containers."""
    layout = block._layout
    relus = [Watched(name, held_at(block, name), nn.ReLU) for name in dict.fromkeys(filter(None, layout.relus))]
    optional = (Watched(name, held_at(block, name), nn.Identity) for name in layout.optional)
    return [*relus, *(other for other in optional if other.module is not None), *watched_in(block)]


def _shortcut(name: str, module: object, kind: type) -> tuple[UnitParts | None, list[Watched], Watched | None]:
    """The shortcut's convolution and BatchNorm, None for the identity; all else, which has to be identities; a pool.

    What follows the convolution is taken for the BatchNorm, so that another norm is refused as one.
    """
    if module is None:
        return None, [], None
    if isinstance(module, _ConvNd):
        return UnitParts(module, None, name), [], None
    if type(module) is nn.Identity or not isinstance(module, nn.Module):
        return None, [Watched(name, module, nn.Identity)], None
    others, children = [Watched(name, module, kind)], children_of(name, module)
    nested = [at for at, child in enumerate(children) if type(child[1]) is kind]
    if nested and kind is not nn.Sequential and type(module) is nn.Sequential:  # its children stand in its place
        inner = children[nested[0]]
        others = [Watched(name, module, nn.Sequential), Watched(*inner, kind)]
        children[nested[0] : nested[0] + 1] = children_of(*inner)
    conv = bn = pool = None
    for place, child in children:
        if conv is None and isinstance(child, _ConvNd):
            conv = place, child
        elif conv is not None and bn is None and type(child) not in (nn.Identity, type(None)):
            bn = place, child
        elif conv is None and pool is None and isinstance(child, nn.AvgPool2d):
            pool = Watched(place, child, nn.AvgPool2d)
        else:
            others.append(Watched(place, child, nn.Identity))
    if conv is None:
        return None, others, pool
    bn_name, norm = bn or ("", None)
    if norm is not None and norm._modules:  # an activation that it holds would follow it
        others.append(Watched(bn_name, norm, type(norm)))
        others += [Watched(place, child, nn.Identity) for place, child in children_of(bn_name, norm)]
    return UnitParts(conv[1], norm, conv[0], bn_name), others, pool


class StageMixin(Changed):
    """A stage that runs its blocks one after the other: see `FusedSequential`."""

    def _call(self, x: Tensor) -> Tensor:
        if getattr(self, "grad_checkpointing", False):
            return self._eager_method(x)
        return run_in_turn(blocks_of(self)._modules.values(), x)


def blocks_of(stage: nn.Module) -> nn.Module:
    """What holds the blocks of a stage of an eager or fused class, and nothing else."""
    return held_at(stage, "layers") or stage
