"""The fused operators, registered with `torch.library`: schema, implementation, fake implementation, autograd.

The one place where kernels meet autograd. `torch.compile`, `torch.export` and `torch.library.opcheck` see each
operator as one node. Activations here are channels_last and checked; `resnet.functional` converts and checks.

    fused_residual::batch_norm_add_relu        out = relu(batch_norm(x) [+ shortcut])
    fused_residual::stem                       out = max_pool(relu(batch_norm(conv(x)))), the pool 3x3 with stride 2
    fused_residual::residual_block             the block in training, or in evaluation where gradients are wanted
    fused_residual::residual_block_inference   the block with frozen statistics and without gradients
    fused_residual::stem_inference             the stem, likewise

Operators that take running statistics update them in place, which `torch.library.custom_op` does not allow together
with an autograd formula. They are therefore defined on a `Library`, with the formula on the Autograd key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import Library, register_fake

from resnet import backends
from resnet.block import Convolutions, Needs, Saved
from resnet.norm import Norm, statistics_dtype
from resnet.torch_backend.convolution import out_size

_NAMESPACE = "fused_residual"
_LIBRARY = Library(_NAMESPACE, "DEF")
_ops = getattr(torch.ops, _NAMESPACE)


# A Norm in a schema
_NORM = (
    "Tensor? weight{i}, Tensor? bias{i}, Tensor({a}!)? running_mean{i}, Tensor({b}!)? running_var{i}, "
    "Tensor? conv_bias{i}, bool training{i}, float momentum{i}, float eps{i}"
)
_FROZEN = _NORM.replace("({a}!)", "").replace("({b}!)", "")
_NORM1, _NORM2 = _NORM.format(i=1, a="a", b="b"), _NORM.format(i=2, a="c", b="d")
_NORM_FIELDS = len(Norm._fields)


def _define(schema: str, fake: Callable, formula: type[torch.autograd.Function] | None = None) -> Callable:
    """Decorator: register an implementation under `schema`; `formula.apply(keyset, *args)` is its autograd."""
    name = schema[: schema.index("(")]

    def decorate(implementation: Callable) -> Callable:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
        if formula is not None:
            op = getattr(_ops, name).default

            def autograd(keyset: torch._C.DispatchKeySet, *args):
                if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                    return formula.apply(keyset, *args)
                return _below_autograd(op, keyset, args)

            _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
        return implementation

    return decorate


def _below_autograd(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, args: Sequence):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _once(name: str) -> type[torch.autograd.Function]:
    """The autograd of a backward operator: it may be recorded (`create_graph=True`), not differentiated."""

    class NoDoubleBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            return tuple(_below_autograd(getattr(_ops, name).default, keyset, args))

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                f"{_NAMESPACE}::{name} has no derivative: double backward through the fused operators is not "
                "supported. Use resnet.Residual, the eager block with the same state_dict, where it is needed."
            )

    return NoDoubleBackward


def _like(t: Tensor) -> Tensor:
    """An empty gradient or activation for t: channels_last where it has four axes."""
    return torch.empty_like(t, memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)


def _stats_like(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((4, channels), dtype=statistics_dtype(x.dtype))


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _mark_updated(norm: Norm) -> None:
    """Count the update of the running statistics in their version, since a kernel's write is not counted."""
    if norm.training:
        for running in (norm.running_mean, norm.running_var):
            if running is not None:
                torch.autograd.graph.increment_version(running)


def _conv_bias_grad(norm: Norm, stats: Tensor, sum_g: Tensor) -> Tensor:
    """Zero under batch statistics, where the bias cancels; sum dx = scale * sum g under frozen ones."""
    if norm.training:
        return torch.zeros_like(norm.conv_bias)
    return (stats[2] * sum_g).to(norm.conv_bias.dtype)


# ---- relu(batch_norm(x) + shortcut) ------------------------------------------------------------------------------


def _batch_norm_add_relu_fake(x, shortcut, weight, bias, running_mean, running_var, *_):
    return _like(x), _stats_like(x, x.shape[1])


class _BatchNormAddReluGrad(torch.autograd.Function):
    """Saves x, out, stats and the parameters: nothing else of the size of an activation."""

    @staticmethod
    def forward(ctx, keyset, x, shortcut, weight, bias, running_mean, running_var, conv_bias, *settings):
        args = (x, shortcut, weight, bias, running_mean, running_var, conv_bias, *settings)
        out, stats = _below_autograd(_ops.batch_norm_add_relu.default, keyset, args)
        ctx.training, _, ctx.eps, ctx.relu = settings
        ctx.shortcut = shortcut is not None
        ctx.save_for_backward(x, out if ctx.relu else None, stats, weight, bias, conv_bias)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 12
        x, out, stats, weight, bias, conv_bias = ctx.saved_tensors
        needs_x, needs_shortcut = ctx.needs_input_grad[1:3]
        needs = [needs_x, needs_shortcut and ctx.relu, *ctx.needs_input_grad[3:5], ctx.needs_input_grad[7]]
        grads = iter(
            _ops.batch_norm_add_relu_backward(
                _dense(dout),
                x,
                out,
                stats,
                weight,
                bias,
                conv_bias,
                ctx.training,
                ctx.eps,
                ctx.relu,
                ctx.shortcut,
                needs,
            )
        )
        dx, dshortcut, dweight, dbias, dconv_bias = (next(grads) if need else None for need in needs)
        if needs_shortcut and not ctx.relu:
            dshortcut = dout
        return (None, dx, dshortcut, dweight, dbias, None, None, dconv_bias, *(None,) * 4)


@_define(
    "batch_norm_add_relu(Tensor x, Tensor? shortcut, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? conv_bias, bool training, float momentum, float eps, bool relu) "
    "-> (Tensor out, Tensor stats)",
    _batch_norm_add_relu_fake,
    _BatchNormAddReluGrad,
)
def _batch_norm_add_relu(
    x, shortcut, weight, bias, running_mean, running_var, conv_bias, training, momentum, eps, relu
):
    if x.numel() == 0:
        return _like(x), _stats_like(x, x.shape[1]).zero_()
    norm = Norm(weight, bias, running_mean, running_var, conv_bias, training, momentum, eps)
    out, stats = backends.implementation(x).batch_norm_add_relu(x, norm, shortcut, relu=relu)
    _mark_updated(norm)
    return out, stats


def _needed(needs: Sequence[bool], candidates: Sequence) -> list:
    return [c for c, need in zip(candidates, needs, strict=True) if need]


def _batch_norm_add_relu_backward_fake(
    dout, x, out, stats, weight, bias, conv_bias, training, eps, relu, shortcut, needs
):
    return [_like(t) for t in _needed(needs, (x, x, weight, bias, conv_bias))]


@_define(
    "batch_norm_add_relu_backward(Tensor dout, Tensor x, Tensor? out, Tensor stats, Tensor? weight, Tensor? bias, "
    "Tensor? conv_bias, bool training, float eps, bool relu, bool shortcut, bool[] needs) -> Tensor[]",
    _batch_norm_add_relu_backward_fake,
    _once("batch_norm_add_relu_backward"),
)
def _batch_norm_add_relu_backward(dout, x, out, stats, weight, bias, conv_bias, training, eps, relu, shortcut, needs):
    if x.numel() == 0:
        return [_like(t).zero_() for t in _needed(needs, (x, x, weight, bias, conv_bias))]
    norm = Norm(weight, bias, None, None, conv_bias, training, 0.0, eps)
    grad = backends.implementation(x).batch_norm_add_relu_backward(dout, x, out, stats, norm, relu, shortcut)
    dconv_bias = _conv_bias_grad(norm, stats, grad.sum_g) if needs[4] else None
    return _needed(needs, (grad.dx, grad.g, grad.dweight, grad.dbias, dconv_bias))


# ---- the stem: max_pool(relu(batch_norm(conv(x)))) ----------------------------------------------------------------


def _stem_fake(x, weight, stride, padding, *_):
    N, K = x.shape[0], weight.shape[0]
    P, Q = (out_size(x.shape[i], weight.shape[i], stride, padding) for i in (2, 3))
    y = x.new_empty((N, K, P, Q)).to(memory_format=torch.channels_last)
    out = x.new_empty((N, K, out_size(P, 3, 2, 1), out_size(Q, 3, 2, 1))).to(memory_format=torch.channels_last)
    return out, y, torch.empty_like(out, dtype=torch.uint8), _stats_like(x, K)


class _StemGrad(torch.autograd.Function):
    """Saves x, y, and of a quarter of y's size out and a byte per element; stats and the parameters."""

    @staticmethod
    def forward(ctx, keyset, *args):
        out, y, tap, stats = _below_autograd(_ops.stem.default, keyset, args)
        x, weight, ctx.stride, ctx.padding, *norm = args
        norm = Norm(*norm)
        ctx.settings = norm.training, norm.eps
        ctx.save_for_backward(x, y, out, tap, stats, weight, norm.weight, norm.bias, norm.conv_bias)
        ctx.mark_non_differentiable(y, tap, stats)
        ctx.set_materialize_grads(False)
        return out, y, tap, stats

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = [ctx.needs_input_grad[i] for i in (1, 2, 5, 6, 9)]
        grads = iter(
            _ops.stem_backward(_dense(dout), *ctx.saved_tensors, ctx.stride, ctx.padding, *ctx.settings, needs)
        )
        dx, dconv, dweight, dbias, dconv_bias = (next(grads) if need else None for need in needs)
        return (None, dx, dconv, None, None, dweight, dbias, None, None, dconv_bias, None, None, None)


@_define(
    f"stem(Tensor x, Tensor conv_weight, int stride, int padding, {_NORM1}) "
    "-> (Tensor out, Tensor y, Tensor tap, Tensor stats)",
    _stem_fake,
    _StemGrad,
)
def _stem(x, weight, stride, padding, *norm):
    if x.numel() == 0:
        return tuple(t.zero_() for t in _stem_fake(x, weight, stride, padding))
    norm = Norm(*norm)
    out, y, tap, stats = backends.implementation(x).stem_forward(x, weight, norm, stride, padding)
    _mark_updated(norm)
    return _dense(out), y, _dense(tap), stats


def _stem_backward_fake(dout, x, y, out, tap, stats, *rest):
    *parameters, _, _, _, _, needs = rest
    return [_like(t) for t in _needed(needs, (x, *parameters))]


@_define(
    "stem_backward(Tensor dout, Tensor x, Tensor y, Tensor out, Tensor tap, Tensor stats, Tensor conv_weight, "
    "Tensor? weight, Tensor? bias, Tensor? conv_bias, int stride, int padding, bool training, float eps, "
    "bool[] needs) -> Tensor[]",
    _stem_backward_fake,
    _once("stem_backward"),
)
def _stem_backward(
    dout, x, y, out, tap, stats, conv_weight, weight, bias, conv_bias, stride, padding, training, eps, needs
):
    if x.numel() == 0:
        return [_like(t).zero_() for t in _needed(needs, (x, conv_weight, weight, bias, conv_bias))]
    norm = Norm(weight, bias, None, None, conv_bias, training, 0.0, eps)
    grad = backends.implementation(x).stem_backward(
        dout, x, y, out, tap, stats, conv_weight, norm, stride, padding, *needs[:2]
    )
    dconv_bias = _conv_bias_grad(norm, stats, grad.sum_g) if needs[4] else None
    return _needed(needs, (grad.x, grad.conv, grad.weight, grad.bias, dconv_bias))


# ---- the residual block ------------------------------------------------------------------------------------------


def _residual_block_fake(x, conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride, *_):
    channels = conv1_weight.shape[0]
    shape = (x.shape[0], channels, *(out_size(size, 3, stride, 1) for size in x.shape[2:]))
    out, y1, y2 = (x.new_empty(shape).to(memory_format=torch.channels_last) for _ in range(3))
    return out, y1, y2, _stats_like(x, channels), _stats_like(x, channels)


class _ResidualBlockGrad(torch.autograd.Function):
    """Saves x, y1, y2, out, the per-channel stats and the parameters; a1 = relu(bn1(y1)) is computed again."""

    @staticmethod
    def forward(ctx, keyset, *args):
        out, y1, y2, stats1, stats2 = _below_autograd(_ops.residual_block.default, keyset, args)
        x, conv1_weight, conv2_weight, conv3_weight, conv3_bias, ctx.stride, *norms = args
        norm1, norm2 = Norm(*norms[:_NORM_FIELDS]), Norm(*norms[_NORM_FIELDS:])
        ctx.settings = (norm1.training, norm1.eps, norm2.training, norm2.eps)
        ctx.save_for_backward(
            x,
            y1,
            y2,
            out,
            stats1,
            stats2,
            conv1_weight,
            conv2_weight,
            conv3_weight,
            conv3_bias,
            norm1.weight,
            norm1.bias,
            norm1.conv_bias,
            norm2.weight,
            norm2.bias,
            norm2.conv_bias,
        )
        ctx.mark_non_differentiable(y1, y2, stats1, stats2)
        ctx.set_materialize_grads(False)
        return out, y1, y2, stats1, stats2

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        # x, the convolutions' parameters; of each norm weight, bias and conv_bias: the order of the backward operator
        needs = [ctx.needs_input_grad[i] for i in (1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 19)]
        grads = iter(_ops.residual_block_backward(_dense(dout), *ctx.saved_tensors, ctx.stride, *ctx.settings, needs))
        dx, dconv1, dconv2, dconv3, dconv3_bias, *dnorms = (next(grads) if need else None for need in needs)
        dweight1, dbias1, dconv1_bias, dweight2, dbias2, dconv2_bias = dnorms
        return (
            *(None, dx, dconv1, dconv2, dconv3, dconv3_bias, None),
            *(dweight1, dbias1, None, None, dconv1_bias, None, None, None),
            *(dweight2, dbias2, None, None, dconv2_bias, None, None, None),
        )


@_define(
    "residual_block(Tensor x, Tensor conv1_weight, Tensor conv2_weight, Tensor? conv3_weight, Tensor? conv3_bias, "
    f"int stride, {_NORM1}, {_NORM2}) -> (Tensor out, Tensor y1, Tensor y2, Tensor stats1, Tensor stats2)",
    _residual_block_fake,
    _ResidualBlockGrad,
)
def _residual_block(x, conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride, *norms):
    if x.numel() == 0:
        empty = _residual_block_fake(x, conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride)
        return tuple(t.zero_() for t in empty)
    norm1, norm2 = Norm(*norms[:_NORM_FIELDS]), Norm(*norms[_NORM_FIELDS:])
    convs = Convolutions(conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride)
    _, y1, y2, out, stats1, stats2 = backends.implementation(x).block_forward(x, convs, norm1, norm2)
    _mark_updated(norm1)
    _mark_updated(norm2)
    return out, y1, y2, stats1, stats2


def _residual_block_backward_fake(dout, x, y1, y2, out, stats1, stats2, *rest):
    *parameters, _, _, _, _, _, needs = rest
    return [_like(t) for t in _needed(needs, (x, *parameters))]


@_define(
    "residual_block_backward(Tensor dout, Tensor x, Tensor y1, Tensor y2, Tensor out, Tensor stats1, Tensor stats2, "
    "Tensor conv1_weight, Tensor conv2_weight, Tensor? conv3_weight, Tensor? conv3_bias, "
    "Tensor? weight1, Tensor? bias1, Tensor? conv_bias1, Tensor? weight2, Tensor? bias2, Tensor? conv_bias2, "
    "int stride, bool training1, float eps1, bool training2, float eps2, bool[] needs) -> Tensor[]",
    _residual_block_backward_fake,
    _once("residual_block_backward"),
)
def _residual_block_backward(
    dout,
    x,
    y1,
    y2,
    out,
    stats1,
    stats2,
    conv1_weight,
    conv2_weight,
    conv3_weight,
    conv3_bias,
    weight1,
    bias1,
    conv_bias1,
    weight2,
    bias2,
    conv_bias2,
    stride,
    training1,
    eps1,
    training2,
    eps2,
    needs,
):
    if x.numel() == 0:
        parameters = (conv1_weight, conv2_weight, conv3_weight, conv3_bias)
        norms = (weight1, bias1, conv_bias1, weight2, bias2, conv_bias2)
        return [_like(t).zero_() for t in _needed(needs, (x, *parameters, *norms))]
    needs = Needs(*needs)
    norm1 = Norm(weight1, bias1, None, None, conv_bias1, training1, 0.0, eps1)
    norm2 = Norm(weight2, bias2, None, None, conv_bias2, training2, 0.0, eps2)
    convs = Convolutions(conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride)
    saved = Saved(x, y1, y2, out, stats1, stats2)
    grad = backends.implementation(x).block_backward(dout, saved, convs, norm1, norm2, needs)
    return _needed(
        needs,
        (
            grad.x,
            grad.conv1,
            grad.conv2,
            grad.conv3,
            grad.sum_g2.to(conv3_bias.dtype, copy=True) if needs.conv3_bias else None,
            grad.weight1,
            grad.bias1,
            _conv_bias_grad(norm1, stats1, grad.sum_g1) if needs.conv_bias1 else None,
            grad.weight2,
            grad.bias2,
            _conv_bias_grad(norm2, stats2, grad.sum_g2) if needs.conv_bias2 else None,
        ),
    )


# ---- frozen, without gradients: inference -------------------------------------------------------------------------


@_define(
    f"stem_inference(Tensor x, Tensor weight, int stride, int padding, {_FROZEN.format(i=1)}) -> Tensor",
    lambda *args: _stem_fake(*args)[0],
)
def _stem_inference(x, weight, stride, padding, *norm):
    if x.numel() == 0:
        return _stem_fake(x, weight, stride, padding)[0]
    return _dense(backends.implementation(x).stem_inference(x, weight, Norm(*norm), stride, padding))


@_define(
    "residual_block_inference(Tensor x, Tensor conv1_weight, Tensor conv2_weight, Tensor? conv3_weight, "
    f"Tensor? conv3_bias, int stride, {_FROZEN.format(i=1)}, {_FROZEN.format(i=2)}) -> Tensor",
    lambda *args: _residual_block_fake(*args)[0],
)
def _residual_block_inference(x, conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride, *norms):
    if x.numel() == 0:
        return _residual_block_fake(x, conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride)[0]
    norm1, norm2 = Norm(*norms[:_NORM_FIELDS]), Norm(*norms[_NORM_FIELDS:])
    convs = Convolutions(conv1_weight, conv2_weight, conv3_weight, conv3_bias, stride)
    return backends.implementation(x).block_inference(x, convs, norm1, norm2)
