"""The fused operation alone, inside a block of your own.

`resnet.functional.batch_norm_add_relu` is relu(batch_norm(x) + shortcut) in one pass over the activations. Here it
ends each half of a bottleneck, a block that this library does not have. The same block on PyTorch's three operators
gives the same output and the same gradients, up to rounding.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet.functional import batch_norm_add_relu


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions over (N, channels, H, W), with a BatchNorm behind each; the input is added."""

    def __init__(self, channels: int, width: int, fused: bool):
        super().__init__()
        self.fused = fused
        self.convs = nn.ModuleList(
            nn.Conv2d(c, k, size, padding=size // 2, bias=False)
            for c, k, size in ((channels, width, 1), (width, width, 3), (width, channels, 1))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(k) for k in (width, width, channels))

    def norm_add_relu(self, norm: nn.BatchNorm2d, y: Tensor, shortcut: Tensor | None) -> Tensor:
        if self.fused:
            state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return batch_norm_add_relu(y, *state, shortcut=shortcut, training=norm.training, eps=norm.eps)
        return F.relu(norm(y) if shortcut is None else norm(y) + shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = self.norm_add_relu(norm, conv(y), x if i == 2 else None)
        return y


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fused = Bottleneck(64, 16, fused=True).to(device, torch.float64)
    plain = copy.deepcopy(fused)
    plain.fused = False

    x = torch.randn(4, 64, 14, 14, device=device, dtype=torch.float64, requires_grad=True)
    results = {}
    for name, block in (("plain", plain), ("fused", fused)):
        out = block(x)
        results[name] = [out, *torch.autograd.grad(out.square().mean(), [x, *block.parameters()])]
    for what, a, b in zip(("output", "input", *(n for n, _ in fused.named_parameters())), *results.values()):
        print(f"{what}: relative difference {(a - b).norm() / a.norm():.1e}")


if __name__ == "__main__":
    main()
