"""A training loop of your own around the fused net: autocast, channels_last, SGD.

Nothing in it is special to the fused block. Under autocast the block casts its input and its convolutions' weights as
the plain one does; parameters, statistics and their gradients stay float32. The images are Fashion-MNIST's, from a
folder where there is one (see `resnet.data.load`), else from the sample that comes with the package. The net is a
small one, so that a CPU is done in seconds.
"""

import torch
from torch import nn
from torch.nn import functional as F

from resnet import FusedResidual, FusedStem, resnet_block
from resnet.data import Batches, load

EPOCHS, IMAGES, BATCH = 3, 320, 32


def small_resnet() -> nn.Sequential:
    return nn.Sequential(
        FusedStem(1, 16),
        resnet_block(16, 16, 1, first_block=True, block=FusedResidual),
        resnet_block(16, 32, 1, block=FusedResidual),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = load(download=False)
    images, labels = dataset.train_images[:IMAGES], dataset.train_labels[:IMAGES]
    batches = Batches(images, labels, BATCH, device=device, resize=32, memory_format=torch.channels_last, shuffle=True)

    net = small_resnet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    for epoch in range(EPOCHS):
        total = torch.zeros((), device=device)
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        print(f"epoch {epoch + 1}: loss {total.item() / len(batches):.3f}")


if __name__ == "__main__":
    main()
