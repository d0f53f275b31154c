"""A block written by hand, whose norms are fused with what follows them.

The block is torchvision's BasicBlock: convolutions without biases, a BatchNorm behind each. `FusedBatchNorm2d` is an
`nn.BatchNorm2d` that adds the shortcut and ends in the ReLU. It takes over the norms of a net that is there already:
the optimizer, made before, goes on. Trained beside the plain block, both come to the same values, up to rounding.
"""

import copy

import torch
from torch import Tensor, nn

from resnet import FusedBatchNorm2d


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + x), over (N, channels, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class FusedBasicBlock(BasicBlock):
    """The same on two fused norms; in a block of your own they are `FusedBatchNorm2d(channels)` from the start."""

    def __init__(self, block: BasicBlock):
        nn.Module.__init__(self)
        self.conv1, self.bn1 = block.conv1, FusedBatchNorm2d.of(block.bn1)
        self.conv2, self.bn2 = block.conv2, FusedBatchNorm2d.of(block.bn2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = BasicBlock(16).to(device, torch.float64, memory_format=torch.channels_last)
    taken = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9) for block in (taken, plain)]
    fused = FusedBasicBlock(taken)

    x, target = torch.randn(2, 8, 16, 14, 14, device=device, dtype=torch.float64)
    for step in range(4):
        losses = []
        for block, optimizer in zip((fused, plain), optimizers):
            loss = (block(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"step {step}: loss {losses[0]:.6f} fused, {losses[1]:.6f} plain")

    states = fused.state_dict(), plain.state_dict()
    print(f"same state_dict keys: {list(states[0]) == list(states[1])}")
    print(f"batches counted: {fused.bn2.num_batches_tracked}")
    differences = [(states[0][name] - states[1][name]).abs().max().item() for name in states[0]]
    print(f"largest difference of the trained values: {max(differences):.1e}")


if __name__ == "__main__":
    main()
