"""The notebook of d2l.ai's current edition (chapter 8.6) on fused blocks: two names change.

There `Residual` takes `num_channels` alone and infers its input's channels, as `LazyFusedResidual` does. The class
below is the book's ResNet, less `d2l.Classifier`, which brings the loss, the optimizer and the plots and is not needed
here. `LazyResNet18` is the same net ready-made. The first forward, the dry run, gives the layers their shapes;
initialise, compile and optimise after it.
"""

import torch
from torch import nn

from resnet import LazyFusedResidual, LazyFusedStem, LazyResNet18

Residual = LazyFusedResidual  # was: the class of the chapter


class ResNet(nn.Module):  # was: d2l.Classifier
    def __init__(self, arch, num_classes=10):
        super().__init__()
        self.net = nn.Sequential(LazyFusedStem())  # was: self.b1()
        for i, b in enumerate(arch):
            self.net.add_module(f"b{i + 2}", self.block(*b, first_block=(i == 0)))
        last = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.LazyLinear(num_classes))
        self.net.add_module("last", last)

    def block(self, num_residuals, num_channels, first_block=False):
        blk = []
        for i in range(num_residuals):
            if i == 0 and not first_block:
                blk.append(Residual(num_channels, use_1x1conv=True, strides=2))
            else:
                blk.append(Residual(num_channels))
        return nn.Sequential(*blk)

    def forward(self, X):
        return self.net(X)


def init_cnn(module):
    """`d2l.init_cnn`."""
    if type(module) is nn.Linear or type(module) is nn.Conv2d:
        nn.init.xavier_uniform_(module.weight)


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ResNet(((2, 64), (2, 128), (2, 256), (2, 512))).to(device)
    X = torch.rand(2, 1, 96, 96, device=device)
    for name, layer in model.net.named_children():  # the dry run; the book's layer_summary
        X = layer(X)
        print(f"{name} output shape: {tuple(X.shape)}")
    model.net.apply(init_cnn)

    ready_made = LazyResNet18().to(device)
    ready_made.load_state_dict(model.state_dict(), strict=True)
    X = torch.rand(2, 1, 96, 96, device=device)
    print(f"LazyResNet18 gives the same: {torch.equal(ready_made.eval()(X), model.eval()(X))}")


if __name__ == "__main__":
    main()
