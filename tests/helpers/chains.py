"""Chains of blocks: eager ones in an `nn.Sequential`, fused ones in a `FusedSequential`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet import BasicBlock, Bottleneck, FusedSequential, Residual, ResidualBottleneck
from tests.conftest import DEVICE
from tests.helpers.blocks import FUSED, GATED, POOLED, Trio, draw, randomize

# (class, constructor's arguments) of each block; a list is a sequence in the sequence.
RESIDUAL, STRIDED = (Residual, (4, 4)), (Residual, (4, 6, True, 2))
CHAINS = {
    "identities": [RESIDUAL] * 3,
    "a strided 1x1 shortcut": [RESIDUAL, STRIDED, (Residual, (6, 6))],
    "a 1x1 shortcut after a strided one": [STRIDED, (Residual, (6, 4, True)), RESIDUAL],
    "basic blocks": [(BasicBlock, (4, 4)), (BasicBlock, (4, 6, 2)), (BasicBlock, (6, 6))],
    "normed shortcuts alone": [(BasicBlock, (4, 6)), (BasicBlock, (6, 4, 2))],
    "bottlenecks": [(Bottleneck, (8, 4)), (Bottleneck, (16, 4)), (Bottleneck, (16, 4, 2))],
    "groups": [(Bottleneck, (16, 4, 1, {"groups": 2})), (Bottleneck, (16, 4, 2, {"groups": 2}))],
    "pooled shortcuts": [(BasicBlock, (4, 4)), (BasicBlock, (4, 6, 2, POOLED)), (BasicBlock, (6, 6))],
    "gates": [(BasicBlock, (4, 4)), (BasicBlock, (4, 4, GATED)), (BasicBlock, (4, 4)), (BasicBlock, (4, 4))],
    "textbook's bottlenecks": [(ResidualBottleneck, (8, 8)), (ResidualBottleneck, (8, 8))],
    "stages": [[RESIDUAL, RESIDUAL], [STRIDED, [(Residual, (6, 6))]]],
}


def built(blocks: list, fused: bool) -> nn.Sequential:
    modules = []
    for block in blocks:
        if isinstance(block, list):
            modules.append(built(block, fused))
            continue
        kind, args = block
        keywords = args[-1] if isinstance(args[-1], dict) else {}
        modules.append((FUSED[kind] if fused else kind)(*args[: len(args) - bool(keywords)], **keywords))
    return (FusedSequential if fused else nn.Sequential)(*modules)


def chain(blocks: list, *, seed: int = 0, dtype: torch.dtype = torch.float64, train: bool = True) -> Trio:
    """Blocks in a `FusedSequential` beside eager ones in an `nn.Sequential`, with the weights of `seed`."""
    torch.manual_seed(seed)
    eager = built(blocks, False)
    randomize(eager)
    eager = eager.to(DEVICE, dtype).train(train)
    fused = built(blocks, True).to(DEVICE, dtype).train(train)
    fused.load_state_dict(eager.state_dict(), strict=True)
    return Trio(eager, fused, copy.deepcopy(eager).double())


def inputs(blocks: list, dtype: torch.dtype = torch.float64) -> Tensor:
    while isinstance(blocks, list):
        blocks = blocks[0]
    return draw(2, blocks[1][0], 5, 6, dtype=dtype)


FUSED_BLOCKS = tuple(FUSED[kind] for kind in (Residual, ResidualBottleneck, BasicBlock, Bottleneck))


def apart(fused: nn.Module) -> nn.Sequential:
    """The same blocks, called by one that knows nothing of them."""
    return nn.Sequential(*(module for module in fused.modules() if isinstance(module, FUSED_BLOCKS)))


def grads_of(net: nn.Module, x: Tensor, run: Callable[[Tensor, list[Tensor]], object]) -> object:
    """`run` of the output and of all that wants a gradient."""
    return run(net(x := x.clone().requires_grad_()), [x, *net.parameters()])


def watch(t: Tensor, note: Callable[[Tensor], object]) -> None:
    t.register_hook(lambda g: note(g.clone()))
