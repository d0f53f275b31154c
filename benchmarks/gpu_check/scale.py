"""How large a check is: as users train, or so small that a CPU rehearses each of its lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scale:
    device: torch.device
    batch: int  # images of the net
    resize: int  # their height and width
    model: str  # a net of `resnet.published`, on as many images
    block_batch: int  # of a block alone
    blocks: tuple[tuple[int, int, int, int], ...]  # input channels, channels, stride, height and width of the input
    others: tuple[tuple[str, int, int, int, int], ...]  # the kind of a `parity.Task` before these
    rounds: int  # of a timed function
    calls: int  # of the function in a round
    copied_bytes: int
    matrix: int  # rows and columns
    epochs: tuple[str, ...]  # options of `resnet.train`
    dtype: torch.dtype = torch.bfloat16  # under autocast

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


_BLOCKS = (
    *((64, 64, 1, 24), (64, 128, 2, 24), (128, 128, 1, 12), (128, 256, 2, 12)),
    *((256, 256, 1, 6), (256, 512, 2, 6), (512, 512, 1, 3)),
)
_OTHERS = (
    *(("Bottleneck", 64, 64, 1, 24), ("Bottleneck", 256, 64, 1, 24), ("Bottleneck", 256, 128, 2, 24)),
    *(("Bottleneck", 2048, 512, 1, 3), ("BasicBlock", 64, 128, 2, 24), ("Bottleneck-D", 256, 128, 2, 24)),
    *(("Bottleneck-dilated", 512, 128, 1, 24), ("Bottleneck-grouped", 256, 128, 2, 24)),
    *(("Bottleneck-gated", 256, 64, 1, 24), ("BasicBlock-gated", 64, 128, 2, 24)),
    *(("pre-activation", 64, 64, 1, 24), ("pre-activation", 64, 128, 2, 24)),
    *(("BasicBlock-chain", 64, 128, 2, 24), ("Bottleneck-chain", 64, 64, 2, 24)),
    *(("Stem", 1, 64, 4, 96), ("Stem", 3, 64, 4, 96), ("deep stem", 3, 64, 4, 96)),
)


def full() -> Scale:
    """The textbook's training: ResNet-18 on batches of 256 images of 96x96."""
    return Scale(torch.device("cuda"), 256, 96, "resnet50", 256, _BLOCKS, _OTHERS, 20, 4, 2**31, 8192, ())


def rehearsal() -> Scale:
    small = ("--epochs", "1", "--limit-train", "16", "--limit-test", "8", "--batch-size", "8", "--resize", "32")
    strided = ("Bottleneck", "Bottleneck-D", "Bottleneck-grouped")
    stems = (("Stem", 3, 8, 4, 13), ("deep stem", 3, 8, 4, 13))
    # A dilation is the kernels' own without a stride, and an identity is what gates have beside them most often.
    one = ("Bottleneck-dilated", 8, 4, 1, 5), ("Bottleneck-gated", 16, 4, 1, 5), ("pre-activation", 8, 16, 2, 5)
    chains = (("BasicBlock-chain", 8, 4, 2, 9), ("Bottleneck-chain", 8, 4, 2, 9))
    others = (*((kind, 8, 4, 2, 5) for kind in strided), *one, *chains, *stems)
    return Scale(
        torch.device("cpu"), 4, 32, "resnet18", 512, ((8, 8, 1, 5), (8, 16, 2, 5)), others, 3, 1, 2**20, 64, small
    )
