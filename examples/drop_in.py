"""Swap the block of a trained net: one name changes, the checkpoint and the outputs stay.

`FusedResidual` has the constructor, the parameters and the buffers of the textbook's `Residual`, so a net is built by
the same code, a checkpoint of the plain net loads strictly, and the outputs differ by rounding alone. The script makes
such a checkpoint first, since it has none of yours.
"""

import tempfile
from pathlib import Path

import torch

from resnet import FusedResidual, Residual, resnet18

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_checkpoint(path: Path) -> None:
    """What a training run of the plain net leaves: here, of two batches of noise."""
    net = resnet18(num_classes=10, in_channels=1, block=Residual).to(device)
    for _ in range(2):
        net(torch.rand(16, 1, 48, 48, device=device))  # moves the running statistics from where they begin
    torch.save(net.state_dict(), path)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18-eager.pt"
        make_checkpoint(path)
        state = torch.load(path, map_location=device)

    eager = resnet18(num_classes=10, in_channels=1, block=Residual).to(device)
    fused = resnet18(num_classes=10, in_channels=1, block=FusedResidual).to(device)  # the one name that changes
    eager.load_state_dict(state, strict=True)
    fused.load_state_dict(state, strict=True)

    x = torch.rand(8, 1, 48, 48, device=device)
    with torch.no_grad():
        expected, got = eager.eval()(x), fused.eval()(x)
    print(f"tensors loaded: {len(state)}")
    print(f"same state_dict keys: {list(eager.state_dict()) == list(fused.state_dict())}")
    print(f"largest output: {expected.abs().max():.3g}")
    print(f"largest difference of outputs: {(got - expected).abs().max():.3g}")


if __name__ == "__main__":
    main()
