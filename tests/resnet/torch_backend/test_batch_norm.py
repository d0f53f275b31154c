"""BatchNorm's statistics on PyTorch's operators, with the cumulative average as a device without the host has it."""

import pytest
import torch

from resnet.norm import statistics_dtype
from resnet.torch_backend.batch_norm import average_stats
from tests.conftest import DEVICE
from tests.helpers.blocks import DTYPES, draw, name_of


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("conv_bias", [False, True], ids=["", "conv_bias"])
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_statistics_averaged_by_a_tensor_are_those_averaged_by_a_number(dtype, conv_bias, count):
    C, acc = 5, statistics_dtype(dtype)
    x, bias = draw(3, C, 4, 6, dtype=dtype), draw(C, seed=1, dtype=dtype) if conv_bias else None
    expected, got = ([draw(C, seed=2, dtype=acc), draw(C, seed=3, dtype=acc).abs()] for _ in range(2))
    mean_var = torch.ops.aten.batch_norm_update_stats(x, *expected, 1.0 / count)
    if conv_bias:
        expected[0].add_(bias, alpha=1.0 / count)
    batches = torch.tensor(count, device=DEVICE)
    torch.testing.assert_close(average_stats(x, *got, batches, bias), mean_var, rtol=0, atol=0)
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(acc).eps, atol=torch.finfo(acc).eps)
    assert batches == count
