"""The fused operators. Activations here are channels_last and checked; `resnet.functional` converts and checks.

    fused_residual::batch_norm_add_relu        out = relu(batch_norm(x) [+ shortcut])
    fused_residual::squeeze_2, squeeze_3       a chain of units up to the means from which gates are computed
    fused_residual::excite                     out = [relu](gate * [relu](batch_norm(y)) [+ shortcut]), y a chain's last
    fused_residual::stem                       out = max_pool(relu(batch_norm(conv(x)))), the pool 3x3 with stride 2
    fused_residual::deep_stem                  the stem of three convolutions, with BatchNorm and ReLU between them
    fused_residual::residual_block_2           a block of two units in training, or in evaluation where gradients are
                                               wanted; _3: of three; _2_normed, _3_normed: its shortcut has a norm;
                                               _2_pooled, _3_pooled: that, and the shortcut reads a pooled x
    fused_residual::pre_activation_block_2, _3 a block of two or three convolutions with norms and ReLUs before them
    fused_residual::<block>_frozen             the block with norms of constants: frozen statistics, no vector trained
    fused_residual::<block>_inference          the block with frozen statistics and without gradients
    fused_residual::[deep_]stem_inference      the stem with frozen statistics and without gradients

The named tuples of `operands` say what each takes, gives and keeps; `registration` makes operators of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet import backends, flops
from resnet.norm import KeptNorm, Norm, statistics_dtype
from resnet.operands import (
    BLOCK_KINDS,
    FROZEN_KINDS,
    PRE_ACTIVATION_KINDS,
    SQUEEZE_KINDS,
    BatchNormAddRelu,
    BatchNormAddReluKept,
    BatchNormAddReluOutput,
    BlockBefore,
    BlockKind,
    DeepStem,
    DeepStemKept,
    DeepStemOutput,
    Excite,
    ExciteKept,
    ExciteOutput,
    KeptConv,
    KeptUnit,
    Pooled,
    Projection,
    Stem,
    StemKept,
    StemOutput,
    Unit,
    UnitGrad,
    all_wanted,
    grad_inputs,
    pre_activation_inputs,
    shortcut_reached,
    wanted,
)
from resnet.registration import (
    Differentiable,
    Inference,
    call,
    dense,
    function_mode,
    is_direct,
    is_transformed_or_recorded,
    like_of,
    wrapper,
)
from resnet.torch_backend.convolution import chain_shapes, out_map, out_size

__all__ = ["call", "function_mode", "is_direct", "is_transformed_or_recorded", "wrapper"]

# ---- what the operators share ------------------------------------------------------------------------------------


def _laid_out(grad: Tensor | None, weight: Tensor) -> Tensor | None:
    """A convolution's grad-weight in the type and strides of the weight.

    Strides of single values address the same memory. They are set all the same: `DistributedDataParallel` compares them
    with its bucket's, and warns.
    """
    if grad is None:
        return None
    strides = weight.stride()
    if grad.dtype == weight.dtype:
        if grad.stride() == strides:
            return grad
        if all(n == 1 or s == t for n, s, t in zip(grad.shape, grad.stride(), strides)):
            return grad.as_strided(grad.shape, strides)
    return like_of(weight).copy_(grad)


def _places(grad: Tensor | None, weight: Tensor | None, master: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A grad-weight in the places of the weight and of the master: it is the master's where there is one."""
    if grad is None:
        return None, None
    return (_laid_out(grad, weight), None) if master is None else (None, _laid_out(grad, master))


def _empty_map(x: Tensor, channels: int, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _empty_stats(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((4, channels), dtype=statistics_dtype(x.dtype))


def _like_norm(norm: KeptNorm) -> Norm:
    """The norm's parameters in their places."""
    return Norm(norm.weight, norm.bias, None, None, norm.conv_bias, None, None, None, group=None)


def _norm_grads(
    norm: KeptNorm,
    dweight: Tensor | None,
    dbias: Tensor | None,
    stats: Tensor,
    sum_g: Tensor,
    needs: Norm,
    zeros: Tensor | None,
) -> Norm:
    """The gradients in a norm's places.

    The convolution's bias cancels under batch statistics, so its gradient is zero: `zeros`, where the backend gave
    them. Under frozen ones its gradient is sum dx = scale * sum g.
    """
    dconv_bias = None
    if needs.conv_bias:
        if not norm.training:
            dconv_bias = (stats[2] * sum_g).to(norm.conv_bias.dtype)
        elif zeros is not None:
            dconv_bias = zeros
        else:
            dconv_bias = torch.zeros_like(norm.conv_bias, memory_format=torch.contiguous_format)
    return Norm(dweight, dbias, None, None, dconv_bias, None, None, None, group=None)


def _of_kind(kind: BlockKind, **functions: object) -> Differentiable:
    """The operator of a kind, by the functions that differ."""
    return Differentiable(kind.name, kind.arguments, kind.output, kind.kept, keep_moves=True, **functions)


# ---- relu(batch_norm(x) + shortcut) ------------------------------------------------------------------------------


def _batch_norm_add_relu(arguments: BatchNormAddRelu) -> BatchNormAddReluOutput:
    x, shortcut, norm, relu = arguments
    out, stats = backends.implementation(x).batch_norm_add_relu(x, norm, shortcut, relu=relu)
    return BatchNormAddReluOutput(out, stats)


def _batch_norm_add_relu_backward(
    dout: Tensor, kept: BatchNormAddReluKept, needs: BatchNormAddRelu
) -> BatchNormAddRelu:
    x, out, stats, norm, relu, added = kept
    grad = backends.implementation(x).batch_norm_add_relu_backward(dout, x, out, stats, norm, relu, added)
    norm_grads = _norm_grads(norm, grad.dweight, grad.dbias, stats, grad.sum_g, needs.norm, grad.conv_bias)
    return BatchNormAddRelu(grad.dx, grad.g, norm_grads, None)


Differentiable(
    "batch_norm_add_relu",
    BatchNormAddRelu,
    BatchNormAddReluOutput,
    BatchNormAddReluKept,
    fake=lambda a: BatchNormAddReluOutput(like_of(a.x), _empty_stats(a.x, a.x.shape[1])),
    forward=_batch_norm_add_relu,
    keep=lambda a, o: BatchNormAddReluKept(
        a.x, o.out if a.relu else None, o.stats, a.norm.kept(), a.relu, a.shortcut is not None
    ),
    keep_moves=False,
    like=lambda kept: BatchNormAddRelu(kept.x, kept.x, _like_norm(kept.norm), None),
    backward=_batch_norm_add_relu_backward,
    norms=lambda a, o: [(a.norm, o.stats)],
    summed=lambda kept, needs: [(kept.norm, kept.stats)],
    same=lambda kept: {} if kept.relu else {"shortcut": "dout"},
).register()

# ---- the stem: max_pool(relu(batch_norm(conv(x)))) ----------------------------------------------------------------


def _unit_grads(unit: KeptUnit, grad: UnitGrad, stats: Tensor, needs: Unit) -> Unit:
    """The gradients in a unit's places."""
    dweight, dmaster = _places(grad.conv, unit.weight, unit.master)
    norm = _norm_grads(unit.norm, grad.weight, grad.bias, stats, grad.sum_g, needs.norm, grad.conv_bias)
    return Unit(dweight, None, norm, dmaster)


def _like_part(part: KeptUnit | Projection) -> Unit | Projection:
    """What is trained of it, in its place."""
    if isinstance(part, Projection):
        return part
    return Unit(part.weight, None, _like_norm(part.norm), part.master)


def _stem_fake(arguments: Stem) -> StemOutput:
    x, unit = arguments
    K = unit.weight.shape[0]
    P, Q = out_map(x.shape, unit.weight.shape, unit.geometry)
    out = _empty_map(x, K, out_size(P, 3, 2, 1), out_size(Q, 3, 2, 1))
    return StemOutput(out, _empty_map(x, K, P, Q), torch.empty_like(out, dtype=torch.uint8), _empty_stats(x, K))


def _stem(arguments: Stem) -> StemOutput:
    out, y, tap, stats = backends.implementation(arguments.x).stem_forward(*arguments)
    return StemOutput(dense(out), y, dense(tap), stats)


def _stem_backward(dout: Tensor, kept: StemKept, needs: Stem) -> Stem:
    needs = needs._replace(unit=wanted(needs.unit))
    grad = backends.implementation(kept.x).stem_backward(dout, kept, needs)
    return Stem(grad.x, _unit_grads(kept.unit, grad.unit, kept.output.stats, needs.unit))


Differentiable(
    "stem",
    Stem,
    StemOutput,
    StemKept,
    fake=_stem_fake,
    forward=_stem,
    keep=lambda a, output: StemKept(a.x, output, a.unit.kept()),
    keep_moves=True,
    like=lambda kept: Stem(kept.x, _like_part(kept.unit)),
    backward=_stem_backward,
    norms=lambda a, o: [(a.unit.norm, o.stats)],
    summed=lambda kept, needs: [(kept.unit.norm, kept.output.stats)],
).register()

# ---- the stem of three convolutions --------------------------------------------------------------------------------


def _empty_maps(x: Tensor, units: tuple[Unit, ...]) -> tuple[Tensor, ...]:
    """The outputs of a chain of convolutions."""
    return tuple(_empty_map(x, *shape[1:]) for shape in chain_shapes(x.shape, units))


def _chain_summed(
    norms: list[tuple[KeptNorm, Tensor]], needs: tuple, beside: Sequence[tuple[KeptNorm, Tensor]] = ()
) -> list[tuple[KeptNorm, Tensor]]:
    """The norms of a chain whose sums backward takes, in its order; those `beside` the last one come right after it."""
    earlier = [norm for norm, asked in zip(norms, grad_inputs(needs)[1:]) if asked]
    return [norms[-1], *beside, *reversed(earlier)]


def _deep_stem_fake(arguments: DeepStem) -> DeepStemOutput:
    x, units = arguments
    ys = _empty_maps(x, units)
    _, K, P, Q = ys[-1].shape
    out = _empty_map(x, K, out_size(P, 3, 2, 1), out_size(Q, 3, 2, 1))
    stats = tuple(_empty_stats(x, unit.weight.shape[0]) for unit in units)
    return DeepStemOutput(out, ys, torch.empty_like(out, dtype=torch.uint8), stats)


def _deep_stem(arguments: DeepStem) -> DeepStemOutput:
    out, ys, tap, stats = backends.implementation(arguments.x).deep_stem_forward(*arguments)
    return DeepStemOutput(dense(out), ys, dense(tap), stats)


def _deep_stem_backward(dout: Tensor, kept: DeepStemKept, needs: DeepStem) -> DeepStem:
    needs = all_wanted(needs)
    grad = backends.implementation(kept.x).deep_stem_backward(dout, kept, needs)
    return DeepStem(grad.x, tuple(map(_unit_grads, kept.units, grad.units, kept.output.stats, needs.units)))


Differentiable(
    "deep_stem",
    DeepStem,
    DeepStemOutput,
    DeepStemKept,
    fake=_deep_stem_fake,
    forward=_deep_stem,
    keep=lambda a, output: DeepStemKept(a.x, output, tuple(unit.kept() for unit in a.units)),
    keep_moves=True,
    like=lambda kept: DeepStem(kept.x, tuple(map(_like_part, kept.units))),
    backward=_deep_stem_backward,
    norms=lambda a, o: [(unit.norm, stats) for unit, stats in zip(a.units, o.stats, strict=True)],
    summed=lambda kept, needs: _chain_summed(
        [(unit.norm, stats) for unit, stats in zip(kept.units, kept.output.stats, strict=True)], all_wanted(needs)
    ),
).register()

# ---- the residual block ------------------------------------------------------------------------------------------


def _trained(kind: BlockKind, x: Tensor | None, units: tuple, shortcut: tuple) -> tuple:
    """These in the places of a kind's arguments, of which a pooled x has no gradient."""
    return kind.arguments(x, units, shortcut, *[_UNPOOLED] * ("pooled" in kind.arguments._fields))


_UNPOOLED = Pooled(*[None] * len(Pooled._fields))


def _block_operator(kind: BlockKind) -> Differentiable:
    """The operator of a kind of block: what differs between kinds is their description alone."""

    def fake(arguments: tuple) -> tuple:
        x, units, shortcut, *_ = arguments
        ys, stats = _empty_maps(x, units), tuple(_empty_stats(x, unit.weight.shape[0]) for unit in units)
        projected = (torch.empty_like(ys[-1]), torch.empty_like(stats[-1])) if isinstance(shortcut, Unit) else ()
        return kind.output(torch.empty_like(ys[-1]), ys, stats, projected)

    def forward(arguments: tuple) -> tuple:
        return kind.output(*backends.implementation(arguments.x).block_forward(*arguments))

    def keep(arguments: tuple, output: tuple) -> tuple:
        x, units, shortcut, *pooled = arguments
        return kind.kept(x, output, tuple(unit.kept() for unit in units), shortcut.kept(), *pooled)

    def norms(part: tuple, output: tuple) -> list[tuple[Norm | KeptNorm, Tensor]]:
        found = [(unit.norm, stats) for unit, stats in zip(part.units, output.stats, strict=True)]
        return [*found, (part.shortcut.norm, output.shortcut[1])] if output.shortcut else found

    def summed(kept: tuple, needs: tuple) -> list[tuple[KeptNorm, Tensor]]:
        """The last norm, the shortcut's, and the others from the last one on, as far as anything asks for them."""
        needs, found, units = all_wanted(needs), norms(kept, kept.output), len(kept.units)
        normed = found[units:] if kept.output.shortcut and shortcut_reached(needs) else []
        return _chain_summed(found[:units], needs, normed)

    def backward(dout: Tensor, kept: tuple, needs: tuple) -> tuple:
        return linked(dout, kept, needs)[0]

    def linked(
        dout: Tensor, kept: tuple, needs: tuple, *link: BlockBefore | Tensor | None
    ) -> tuple[tuple, Tensor | None]:
        needs = all_wanted(needs)
        grad = backends.implementation(kept.x).block_backward(dout, kept, needs, *link)
        units = map(_unit_grads, kept.units, grad.units, kept.output.stats, needs.units)
        if isinstance(kept.shortcut, KeptUnit):
            shortcut = _unit_grads(kept.shortcut, grad.shortcut, kept.output.shortcut[1], needs.shortcut)
        else:
            shortcut = _projection_grads(kept.shortcut, grad.shortcut, needs.shortcut)
        return _trained(kind, grad.x, tuple(units), shortcut), grad.partial

    return _of_kind(
        kind,
        fake=fake,
        forward=forward,
        keep=keep,
        like=lambda kept: _trained(kind, kept.x, tuple(map(_like_part, kept.units)), _like_part(kept.shortcut)),
        backward=backward,
        norms=norms,
        summed=summed,
        linked=linked,
    )


def _projection_grads(projection: Projection, grad: UnitGrad, needs: Projection) -> Projection:
    """The gradients in a projection's places."""
    dweight, dmaster = _places(grad.conv, projection.weight, projection.master)
    dbias = grad.sum_g.to(projection.bias.dtype, copy=True) if needs.bias else None
    return Projection(dweight, dbias, None, dmaster)


_BLOCKS = tuple(map(_block_operator, BLOCK_KINDS))
for _block in _BLOCKS:
    _block.register()

# ---- the residual block with norms of constants -------------------------------------------------------------------

_UNTRAINED = Norm(None, None, None, None, None, None, None, None, group=None)


def _frozen_operator(kind: BlockKind) -> Differentiable:
    """The operator of a kind of block whose norms are constants: only x and the weights have gradients."""

    def fake(arguments: tuple) -> tuple:
        x, units, shortcut, *_ = arguments
        *inner, out = _empty_maps(x, units)
        norms = (*units, shortcut) if isinstance(shortcut, Unit) else units
        return kind.output(out, tuple(inner), tuple(_empty_stats(x, unit.weight.shape[0]) for unit in norms))

    def forward(arguments: tuple) -> tuple:
        return kind.output(*backends.implementation(arguments.x).frozen_block_forward(*arguments))

    def keep(arguments: tuple, output: tuple) -> tuple:
        x, units, shortcut, *pooled = arguments
        convs = tuple(KeptConv(unit.weight, unit.geometry, unit.master) for unit in units)
        projection = Projection(shortcut.weight, None, shortcut.geometry, shortcut.master)
        return kind.kept(x, output, convs, projection, *pooled)

    def in_places(kept: tuple, x: Tensor | None, weights: list[tuple]) -> tuple:
        """x, and for each convolution a weight and a master, the shortcut's last."""
        *units, shortcut = (Unit(weight, None, _UNTRAINED, master) for weight, master in weights)
        if len(kept.output.stats) == len(units):  # its shortcut has no norm
            shortcut = Projection(shortcut.weight, None, None, shortcut.master)
        return _trained(kind, x, tuple(units), shortcut)

    def like(kept: tuple) -> tuple:
        return in_places(kept, kept.x, [(conv.weight, conv.master) for conv in (*kept.units, kept.shortcut)])

    def backward(dout: Tensor, kept: tuple, needs: tuple) -> tuple:
        grad = backends.implementation(kept.x).frozen_block_backward(dout, kept, all_wanted(needs))
        convs = zip((*kept.units, kept.shortcut), (*grad.units, grad.shortcut), strict=True)
        return in_places(kept, grad.x, [_places(found.conv, conv.weight, conv.master) for conv, found in convs])

    return _of_kind(
        kind,
        fake=fake,
        forward=forward,
        keep=keep,
        like=like,
        backward=backward,
        norms=lambda a, o: [],
        summed=lambda kept, needs: [],
    )


for _kind in FROZEN_KINDS:
    _frozen_operator(_kind).register()

# ---- squeeze-and-excitation ---------------------------------------------------------------------------------------


def _squeeze_operator(kind: BlockKind) -> Differentiable:
    """The operator of a chain that ends in a squeeze, by its number of units."""

    def fake(arguments: tuple) -> tuple:
        x, units, *_ = arguments
        *ys, y = _empty_maps(x, units)
        *inner_stats, stats = (_empty_stats(x, unit.weight.shape[0]) for unit in units)
        N, K = y.shape[:2]
        return kind.output(y, x.new_empty((N, K)), stats.new_empty((3, N, K)), stats, tuple(ys), tuple(inner_stats))

    def forward(arguments: tuple) -> tuple:
        return kind.output(*backends.implementation(arguments.x).squeeze_forward(*arguments))

    def keep(arguments: tuple, output: tuple) -> tuple:
        x, units, relu, added = arguments
        ys, stats = (*output.ys, output.y), (*output.inner_stats, output.stats)
        return kind.kept(x, ys, stats, output.link, tuple(unit.kept() for unit in units), relu, added)

    def backward(dy: Tensor, dpooled: Tensor, dlink: Tensor, kept: tuple, needs: tuple) -> tuple:
        needs = all_wanted(needs)
        grad = backends.implementation(kept.x).squeeze_backward(dy, dpooled, dlink, kept, needs)
        units = map(_unit_grads, kept.units, grad.units, kept.stats, needs.units)
        return kind.arguments(grad.x, tuple(units), None, None)

    return _of_kind(
        kind,
        fake=fake,
        forward=forward,
        keep=keep,
        like=lambda kept: kind.arguments(kept.x, tuple(map(_like_part, kept.units)), None, None),
        backward=backward,
        norms=lambda a, o: zip([unit.norm for unit in a.units], (*o.inner_stats, o.stats), strict=True),
        summed=lambda kept, needs: _chain_summed(
            [(unit.norm, stats) for unit, stats in zip(kept.units, kept.stats, strict=True)], all_wanted(needs)
        ),
        results=3,
        given=4,
        like_results=lambda kept: (kept.ys[-1], kept.x.new_empty(kept.link.shape[1:]), kept.link),
    )


for _kind in SQUEEZE_KINDS:
    _squeeze_operator(_kind).register()


def _excite_backward(dout: Tensor, kept: ExciteKept, needs: Excite) -> Excite:
    grad = backends.implementation(kept.y).excite_backward(dout, kept)
    return Excite(grad.g, None, grad.link, grad.gate, None, None, None)


Differentiable(
    "excite",
    Excite,
    ExciteOutput,
    ExciteKept,
    fake=lambda a: ExciteOutput(like_of(a.y)),
    forward=lambda a: ExciteOutput(backends.implementation(a.y).excite_forward(*a)),
    keep=lambda a, output: ExciteKept(a.y, output.out if a.relu else None, a.stats, a.gate, a.inner_relu),
    keep_moves=False,
    like=lambda kept: Excite(kept.y, None, kept.stats.new_empty((3, *kept.gate.shape)), kept.gate, kept.y, None, None),
    backward=_excite_backward,
    norms=lambda a, o: [],
    summed=lambda kept, needs: [],
    same=lambda kept: {"shortcut": "dout", "y": "dout"} if kept.out is None else {"shortcut": "y"},
).register()

# ---- the residual block with pre-activation -------------------------------------------------------------------------


def _pre_activation_operator(kind: BlockKind) -> Differentiable:
    """The operator of a block with pre-activation, by its number of convolutions."""

    def fake(arguments: tuple) -> tuple:
        x, _, units, conv, *_ = arguments
        ys = _empty_maps(x, units)
        P, Q = out_map(ys[-1].shape, conv.weight.shape, conv.geometry)
        stats = tuple(_empty_stats(x, y.shape[1]) for y in (x, *ys))
        return kind.output(_empty_map(x, conv.weight.shape[0], P, Q), ys, stats)

    def forward(arguments: tuple) -> tuple:
        return kind.output(*backends.implementation(arguments.x).pre_activation_forward(*arguments))

    def keep(arguments: tuple, output: tuple) -> tuple:
        x, norm, units, *others = arguments
        return kind.kept(x, output.ys, output.stats, norm.kept(), tuple(unit.kept() for unit in units), *others)

    def norms(part: tuple, stats: tuple[Tensor, ...]) -> list[tuple[Norm | KeptNorm, Tensor]]:
        return [*zip((part.norm, *(unit.norm for unit in part.units)), stats, strict=True)]

    def summed(kept: tuple, needs: tuple) -> list[tuple[KeptNorm, Tensor]]:
        found = zip(norms(kept, kept.stats), pre_activation_inputs(all_wanted(needs)), strict=True)
        return [norm for norm, asked in found if asked][::-1]

    def backward(dout: Tensor, kept: tuple, needs: tuple) -> tuple:
        needs = all_wanted(needs)
        grad, x_stats = backends.implementation(kept.x).pre_activation_backward(dout, kept, needs), kept.stats[0]
        _, weight, bias, sum_g, zeros = grad.norm
        return kind.arguments(
            grad.x,
            _norm_grads(kept.norm, weight, bias, x_stats, sum_g, needs.norm, zeros),
            tuple(map(_unit_grads, kept.units, grad.units, kept.stats[1:], needs.units)),
            _projection_grads(kept.conv, grad.conv, needs.conv),
            _projection_grads(kept.shortcut, grad.shortcut, needs.shortcut),
            None,
        )

    return _of_kind(
        kind,
        fake=fake,
        forward=forward,
        keep=keep,
        like=lambda kept: kind.arguments(
            kept.x, _like_norm(kept.norm), tuple(map(_like_part, kept.units)), kept.conv, kept.shortcut, None
        ),
        backward=backward,
        norms=lambda a, o: norms(a, o.stats),
        summed=summed,
    )


_PRE_ACTIVATION = tuple(map(_pre_activation_operator, PRE_ACTIVATION_KINDS))
for _block in _PRE_ACTIVATION:
    _block.register()

# ---- frozen, without gradients: inference -------------------------------------------------------------------------


Inference("stem_inference", Stem, _stem_fake, lambda a: backends.implementation(a.x).stem_inference(*a))
Inference(
    "deep_stem_inference", DeepStem, _deep_stem_fake, lambda a: backends.implementation(a.x).deep_stem_inference(*a)
)
for _block in _BLOCKS:
    Inference(
        f"{_block.name}_inference",
        _block.arguments,
        _block.fake,
        lambda a: backends.implementation(a.x).block_inference(*a),
    )
for _block in _PRE_ACTIVATION:
    Inference(
        f"{_block.name}_inference",
        _block.arguments,
        _block.fake,
        lambda a: backends.implementation(a.x).pre_activation_inference(*a),
    )

flops.register()
