"""`kernels/device/implicit_gemm.py`: how operands are rounded. The convolutions' tests have the rest."""

import torch
import triton
import triton.language as tl

from resnet.kernels.device.implicit_gemm import round_to_tf32
from tests.conftest import DEVICE
from tests.helpers.tf32 import as_tf32

KEPT = -(1 << 13)  # the bits of a float32 that a tensor core reads


@triton.jit
def round_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, round_to_tf32(tl.load(x + i)))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What a tensor core reads of x, of 4,096 values, once it is rounded."""
    y = torch.empty_like(x)
    round_kernel[(1,)](x, y, x.numel())
    return (y.view(torch.int32) & KEPT).view(torch.float32)


def test_operands_are_rounded_to_the_nearest_tf32_and_ties_away_from_zero():
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0), device="cpu")
    bits[::4] = bits[::4] & KEPT | 1 << 12  # ties
    x = bits.to(torch.int32).view(torch.float32)
    normal = x.isfinite() & (x.abs() >= torch.finfo(torch.float32).tiny)
    x = torch.where(normal, x, 1.0).to(DEVICE)
    torch.testing.assert_close(rounded(x), as_tf32(x), rtol=0, atol=0)


def test_nan_inf_zero_and_the_largest_number_stay_themselves_or_become_inf():
    """0x7fffffff is the NaN that CUDA's arithmetic gives: adding to its bits would make it a negative number."""
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    others = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.finfo(torch.float32).max])
    x = torch.cat([nan, others, torch.zeros(4096 - 8)]).to(DEVICE)
    got = rounded(x)[:8].tolist()
    assert all(value != value for value in got[:3])
    assert got[3:] == [torch.inf, -torch.inf, 0.0, 0.0, torch.inf]
