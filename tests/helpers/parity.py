"""The criterion of parity: against float64, the fused error is at most twice eager's own, plus one ulp."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Float64 has no better judge than itself: another order of summation costs a few ulp of the largest value.
_FLOAT64_ULPS = 32


def rms(values: Sequence[Tensor]) -> float:
    return torch.cat([v.double().flatten() for v in values]).square().mean().sqrt().item()


def assert_as_exact_as_eager(name: str, fused: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]):
    """Compare root mean square errors of several draws of one tensor, against its float64 values in `exact`.

    The mean is over all draws, since in one of them an element may be lucky or fall on the other side of a ReLU.
    """
    dtype = fused[0].dtype
    assert all(f.dtype == e.dtype and f.shape == e.shape for f, e in zip(fused, eager)), name
    largest = max((x.abs().max().item() for x in exact if x.numel()), default=0.0)
    ulp = torch.finfo(dtype).eps * largest * (_FLOAT64_ULPS if dtype == torch.float64 else 1)
    fused_error = rms([f.double() - x for f, x in zip(fused, exact)])
    eager_error = rms([e.double() - x for e, x in zip(eager, exact)])
    assert fused_error <= 2 * eager_error + ulp, (
        f"{name}: error {fused_error:.3g} against float64, eager's {eager_error:.3g}, one ulp of the largest {ulp:.3g}"
    )


def assert_draws_parity(results: Sequence[dict[str, tuple[Tensor, Tensor, Tensor]]]) -> None:
    """The same of each tensor by name: (fused, eager, exact) in each draw."""
    for name in results[0]:
        assert_as_exact_as_eager(name, *([draws[name][i] for draws in results] for i in range(3)))
