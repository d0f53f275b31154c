"""What the tests of the fused modules share: modules, modes and inputs by name, and two criteria of parity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resnet import BasicBlock, Residual, SmallStem, Stem
from tests.helpers.blocks import GATED, Trio, assert_parity, draw, same, snapshot, step, trio, weights_dtype

IDENTITY, PROJECTED, STRIDED = (4, 4), (4, 6, True), (4, 6, True, 2)
BLOCKS = {"identity": IDENTITY, "1x1": PROJECTED, "1x1 stride 2": STRIDED}
MODES = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "bn1 eval": lambda m: (m.train(), m.bn1.eval()),
    "bn2 eval": lambda m: (m.train(), m.bn2.eval()),
}
blocks = pytest.mark.parametrize("args", BLOCKS.values(), ids=BLOCKS)
modes = pytest.mark.parametrize("mode", MODES)
# Where it is not fused, a module would give eager's values, too.
fused_alone = pytest.mark.filterwarnings("error:.* runs PyTorch's operators one by one")
train_and_eval = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
KINDS = {
    "identity": (Residual, 16, 16),
    "strided": (Residual, 8, 16, True, 2),
    "gates": (BasicBlock, 8, 8, GATED),
    "stem": (Stem, 8, 16),
    "grey stem": (Stem, 1, 16),  # on the CPU a product of windows
    "small stem": (SmallStem, 3, 16),
}
kinds = pytest.mark.parametrize("kind", KINDS)
convolved = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "small stem"])  # by our convolutions
# What a cumulative average cannot count in: (change of the count, error, message).
BAD_COUNTS = {
    "shape": (lambda count: count.view(1), ValueError, r"expected shape \(\), got \(1,\)"),
    "type": (lambda count: count.int(), TypeError, "expected torch.int64, got torch.int32"),
    "device": (lambda count: count.to("meta"), ValueError, "expected the input's device .*, got meta"),
}
MANY = (2, 24, 20)
FEW = (2, 5, 6)


def inference_trio(kind: str, **options) -> Trio:
    return trio(*KINDS[kind], train=False, **options)


def images(kind: str, size: tuple[int, int, int] = MANY, **options) -> Tensor:
    n, h, w = size
    return draw(n, KINDS[kind][1], h, w, **options)


def assert_trios_parity(
    trios: list[Trio], shape: tuple[int, ...], run: Callable[[nn.Module, Tensor], dict[str, Tensor]] = step
) -> None:
    """What `run` gives for inputs of `shape`, one drawn for each trio, is as exact for fused as for eager modules."""
    dtype = weights_dtype(trios[0].fused)
    draws = [draw(*shape, seed=seed, dtype=dtype) for seed in range(len(trios))]
    assert_parity([tuple(run(m, x) for m in t.all) for t, x in zip(trios, draws)])


def assert_exact(t: Trio, x: Tensor, run: Callable[[nn.Module, Tensor], dict[str, Tensor]] = step) -> None:
    """`run` of a float64 trio gives eager's values: where a few values per channel would leave float32 to luck."""
    torch.testing.assert_close(run(t.fused, x), run(t.exact, x), atol=1e-9, rtol=1e-7)


def assert_refused(module: nn.Module, x, error: type[Exception], message: str) -> None:
    """The call fails with this error, and nothing in the module has changed."""

    def stored() -> dict[str, Tensor]:
        return {name: value for name, value in snapshot(module).items() if value.device.type != "meta"}

    before = stored()
    with pytest.raises(error, match=message):
        module(x)
    same(stored(), before)
