"""Convolutions with all that may be fused to them: drawn arguments, and the same in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet.kernels import conv_forward as kernels
from resnet.kernels.conv_forward import ConvOutput, Frozen, Shortcut
from tests.helpers.blocks import draw
from tests.helpers.tf32 import as_tf32

EPS = 1e-5
# What may follow the convolution in its launch, as options of `Case.of`.
EPILOGUES = {
    "none": {},
    "bias": {"bias": True},
    "moments": {"moments": True},
    "bias, moments": {"bias": True, "moments": True},
    "frozen": {"frozen": True},
    "frozen, relu": {"frozen": True, "relu": True},
    "frozen, skip, relu": {"frozen": True, "skip": True, "relu": True},
    "shortcut": {"moments": True, "shortcut": True},
}


@dataclass
class Case:
    """Arguments of one `conv_forward`, drawn; weights scaled so that y has a size of about 1."""

    x: Tensor
    weight: Tensor
    stride: int
    padding: int
    options: dict[str, object]
    dilation: int = 1

    @staticmethod
    def of(
        shape: tuple[int, int, int, int],
        K: int,
        R: int,
        stride: int,
        padding: int,
        dtype: torch.dtype,
        *,
        dilation: int = 1,
        tf32: bool = False,
        prologue: bool = False,
        bias: bool = False,
        frozen: bool = False,
        skip: bool = False,
        shortcut: bool = False,
        seed: int = 0,
        **switches: bool,
    ) -> Case:
        N, C, H, W = shape
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def vector(seed: int) -> Tensor:
            return draw(K, seed=seed, dtype=dtype)

        x = draw(*shape, seed=seed, dtype=dtype)
        weight = (draw(K, C, R, R, seed=seed + 100) / (C * R * R) ** 0.5).to(dtype)
        options: dict[str, object] = dict(switches)
        if tf32:
            options["tf32"] = True
        if prologue:
            options["stats"] = draw(4, C, seed=seed + 200, dtype=acc)
        if bias:
            options["bias"] = vector(seed + 300)
        if frozen:
            mean, var, scale, shift, conv_bias = (vector(seed + 400 + i) for i in range(5))
            options["frozen"] = Frozen(mean, var.abs() + 0.5, scale, shift, conv_bias, EPS)
        if skip:
            P, Q = ((size + 2 * padding - dilation * (R - 1) - 1) // stride + 1 for size in (H, W))
            options["skip"] = draw(N, K, P, Q, seed=seed + 500, dtype=dtype)
        if shortcut:
            z_weight = (draw(K, C, 1, 1, seed=seed + 600) / C**0.5).to(dtype)
            options |= {"shortcut": Shortcut(z_weight, vector(seed + 700)), "shortcut_moments": True}
        return Case(x, weight, stride, padding, options, dilation)

    def run(self, **changes: object) -> ConvOutput:
        geometry = self.stride, self.padding, self.dilation
        return kernels.conv_forward(self.x, self.weight, *geometry, **{**self.options, **changes})

    def reference(self, exact: bool) -> tuple[Tensor, Tensor | None]:
        """y and the shortcut in plain PyTorch: in float64, or with eager's roundings, the result rounded once."""
        dtype, o = self.x.dtype, self.options
        d = torch.float64 if exact or dtype == torch.float64 else torch.float32

        def operand(t: Tensor) -> Tensor:
            """t as a product reads it."""
            return (as_tf32(t) if o.get("tf32") and not exact else t).to(d)

        def column(v: Tensor) -> Tensor:
            return v.to(d).view(1, -1, 1, 1)

        a = self.x.to(d)
        if "stats" in o:
            a = torch.relu(a * column(o["stats"][2]) + column(o["stats"][3]))
            a = a if exact else a.to(dtype)
        y = F.conv2d(operand(a), operand(self.weight), None, self.stride, self.padding, self.dilation)
        if "frozen" in o:
            f = o["frozen"]
            vectors = (v.to(d) for v in (f.running_mean, f.running_var, f.weight, f.bias))
            y = F.batch_norm(y + column(f.conv_bias), *vectors, eps=f.eps)
        if "bias" in o:
            y = y + column(o["bias"])
        if "skip" in o:
            y = y + o["skip"].to(d)
        if o.get("relu"):
            y = torch.relu(y)
        z = None
        if "shortcut" in o:
            z = F.conv2d(operand(self.x), operand(o["shortcut"].weight), o["shortcut"].bias.to(d), self.stride)
        return tuple(t if exact or t is None else t.to(dtype) for t in (y, z))
