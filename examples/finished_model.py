"""A finished model whose blocks and stem `resnet.fuse` changes for fused ones, and back.

The model is a small ResNet in the published form; `torchvision.models.resnet50()`, timm's and transformers' ResNets are
fused by the same call, and so are blocks of your own, by the text of their forward. An optimizer that was made before
goes on, since parameters stay the same objects.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import resnet
from resnet import Bottleneck, ResNet


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ResNet(Bottleneck, depths=(1, 2), widths=(8, 16), num_classes=10)
    model = model.to(device, torch.float64, memory_format=torch.channels_last)
    eager = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (model, eager)]

    print(resnet.fuse(model))
    x, labels = torch.randn(4, 3, 64, 64, device=device, dtype=torch.float64), torch.arange(4, device=device)
    for i in range(3):
        losses = [step(net, optimizer, x, labels) for net, optimizer in zip((model, eager), optimizers)]
        print(f"step {i}: loss {losses[0]:.6f} fused, {losses[1]:.6f} eager")

    resnet.unfuse(model)
    print(f"the classes are the eager ones again: {type(model) is ResNet and type(model.layer1[0]) is Bottleneck}")
    states = model.state_dict(), eager.state_dict()
    differences = [(states[0][name] - states[1][name]).abs().max().item() for name in states[0]]
    print(f"largest difference of the trained values: {max(differences):.1e}")


if __name__ == "__main__":
    main()
