"""Fused modules beside their eager reference: the same weights, the same inputs, and all that a step gives."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from resnet import (
    BasicBlock,
    Bottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    FusedResidual,
    FusedResidualBottleneck,
    FusedSmallStem,
    FusedStem,
    Residual,
    ResidualBottleneck,
    SmallStem,
    SqueezeExcite,
    Stem,
    fuse,
)
from tests.conftest import DEVICE
from tests.helpers.parity import assert_as_exact_as_eager

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DTYPES = (*SIXTEEN_BIT, torch.float32, torch.float64)
FUSED = {
    Residual: FusedResidual,
    ResidualBottleneck: FusedResidualBottleneck,
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    SmallStem: FusedSmallStem,
    Stem: FusedStem,
}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """What is allocated starts as NaN, so that an element that no program wrote fails every comparison."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def name_of(value: object) -> str:
    """A test's id for a type or a set of arguments."""
    return str(value).removeprefix("torch.").replace(" ", "")


def name_of_block(args: tuple) -> str:
    """A test's id for the arguments of a block's constructor."""

    def name(C: int, K: int, use_1x1conv: bool = False, strides: int = 1) -> str:
        return f"{C} to {K} channels" + ", 1x1" * use_1x1conv + f", stride {strides}" * (strides > 1)

    return name(*args)


def named(option: str) -> Callable[[object], str]:
    """Ids for an option's values where they alone would not say what they are."""
    return lambda value: f"{option}={name_of(value)}"


def randomize(module: nn.Module) -> None:
    """Draw what training moves in a BatchNorm, some weights negative: fresh, all of it is ones and zeros.

    What makes the gates of a few channels has a ReLU, too. It is kept from its kink, where one value would decide the
    error of all.
    """
    for bn in module.modules():
        if isinstance(bn, SqueezeExcite):
            bn.fc1.bias.data = (torch.arange(len(bn.fc1.bias)) % 2 * 4.0 - 2).to(bn.fc1.bias)
        if isinstance(bn, nn.BatchNorm2d):
            if bn.affine:
                nn.init.uniform_(bn.weight, -1.5, 1.5)
                nn.init.uniform_(bn.bias, -0.5, 0.5)
            if bn.running_mean is not None:
                bn.running_mean.normal_(0, 0.3)
                bn.running_var.uniform_(0.3, 2.0)


def keep_norms_constant(module: nn.Module) -> nn.Module:
    """BatchNorms in evaluation; no vector per channel is trained. Gives the module."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() == 4)
    return module


def averaged(module: nn.Module) -> None:
    """The running statistics become averages over all batches."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.momentum = None


POOLED = {"avg_down": True}  # of the published blocks: the shortcut pools its input
GATED = {"squeeze_excite": True}


@dataclass
class Trio:
    """One module three times: eager, fused, and eager in float64. `each` makes a change to all three."""

    eager: nn.Module
    fused: nn.Module
    exact: nn.Module

    @property
    def all(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.eager, self.fused, self.exact

    def each(self, change: Callable[[nn.Module], object]) -> Trio:
        for module in self.all:
            change(module)
        return self


def trio(
    kind: type[nn.Module], *args, seed: int = 0, dtype: torch.dtype = torch.float32, train: bool = True, **kwargs
) -> Trio:
    """`kind(*args)` with the weights of `seed`, all three on DEVICE with the same values of type `dtype`.

    Arguments in a list of cases may end with a dict of keywords, such as `POOLED`. A block that is not the library's is
    fused as `fuse` reads it.
    """
    if args and isinstance(args[-1], dict):
        *args, keywords = args
        kwargs |= keywords
    torch.manual_seed(seed)
    eager = kind(*args, **kwargs)
    randomize(eager)
    eager = eager.to(DEVICE, dtype).train(train)
    if kind in FUSED:
        fused = FUSED[kind](*args, **kwargs).to(DEVICE, dtype).train(train)
        fused.load_state_dict(eager.state_dict(), strict=True)
    else:
        fused = copy.deepcopy(eager)
        assert [item.name for item in fuse(fused).fused] == [""]
    return Trio(eager, fused, copy.deepcopy(eager).double())


def deep_stems(*, in_channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, train: bool = True) -> Trio:
    """The stem of a ResNet-D, of 8 channels, in a network that is nothing else."""
    from benchmarks.gpu_check.parity import deep_stem  # here, since some tests run without the benchmarks

    torch.manual_seed(seed)
    eager = deep_stem(in_channels, 8)
    randomize(eager)
    eager = eager.to(DEVICE, dtype).train(train)
    fused = copy.deepcopy(eager)
    assert not fuse(fused).left
    return Trio(eager, fused, copy.deepcopy(eager).double())


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of `dtype` on DEVICE, channels_last."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def staircase(length: int, dtype: torch.dtype) -> Tensor:
    """(length,) values of `dtype` whose sum an accumulator of that type misses.

    The first is 2 / eps, where the type's values are 2 apart. The others are too small to move it one by one, though
    every 64 of them add up to 1.
    """
    values = torch.full((length,), 2.0**-6, dtype=dtype, device=DEVICE)
    values[0] = 2 / torch.finfo(dtype).eps
    return values


def weights_dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def incoming_gradient(out: Tensor) -> Tensor:
    """The gradient with which `step` goes backward: drawn of bfloat16 values, which every type holds."""
    return draw(*out.shape, seed=7, dtype=torch.bfloat16).to(out.dtype)


def as_is(call: Callable[[], Tensor]) -> Tensor:
    return call()


def step(module: nn.Module, x: Tensor, context: Callable[[Callable[[], Tensor]], Tensor] = as_is) -> dict[str, Tensor]:
    """The output, the gradients of the input and of every parameter that wants one, and the buffers, by name.

    x is brought to the weights' type, which loses nothing for an exact copy.
    """
    x = x.detach().to(weights_dtype(module)).requires_grad_()
    out = context(lambda: module(x))
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    dx, *grads = torch.autograd.grad(out, (x, *wanted.values()), incoming_gradient(out))
    return {
        "out": out.detach(),
        "dx": dx,
        **{f"d {name}": grad for name, grad in zip(wanted, grads)},
        **{name: buffer.clone() for name, buffer in module.named_buffers()},
    }


def infer(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output without gradients, under its name; x is brought to the weights' type as `step` does."""
    with torch.no_grad():
        return {"out": module(x.to(weights_dtype(module)))}


def assert_parity(results: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """Each tensor of fused is as exact as eager's and counters are equal, in an (eager, fused, exact) for each draw.

    A bias before batch statistics has a gradient of zero. What float64 finds there is rounding, and counts as zero.
    """
    eager, fused, exact = zip(*results)
    exact = [{name: v * (v.abs() > 1e-11) if name.endswith("bias") else v for name, v in e.items()} for e in exact]
    assert fused[0].keys() == eager[0].keys()
    for name in fused[0]:
        if fused[0][name].is_floating_point():
            assert_as_exact_as_eager(name, *([draws[name] for draws in side] for side in (fused, eager, exact)))
        else:
            assert all(torch.equal(f[name], e[name]) for f, e in zip(fused, eager)), name


def same(a: object, b: object) -> None:
    """Tensors, or sequences or dicts of them, are bit-equal, NaN being equal to NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def saved_and_loaded(module: nn.Module) -> nn.Module:
    """A copy of a whole module by way of `torch.save`."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
