"""Train with the fused block, ship without this library.

A fused net is exported as it is: the graph holds PyTorch's own operators, and the file the graph and the weights, so
what runs it needs PyTorch and not this package. The script shows it by running the file in a Python that never imports
`resnet`. `torch.onnx.export`, `torch.jit.trace` and `torch.jit.script` take the net in the same way.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from resnet import FusedResidual, resnet18

ELSEWHERE = """
import sys, torch
net = torch.export.load("net.pt2").module()
torch.save(net(torch.load("x.pt")), "out.pt")
print("resnet imported where the exported net ran:", "resnet" in sys.modules)
"""


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fused = resnet18(block=FusedResidual).to(device)
    fused(torch.rand(16, 1, 48, 48, device=device))  # stands for training
    fused.eval()

    more = torch.rand(7, 1, 48, 48)  # another batch size than the one that is exported with
    with torch.no_grad():
        expected = fused(more.to(device)).cpu()

    x = torch.rand(4, 1, 48, 48)
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(fused.cpu(), (x,), dynamic_shapes=({0: batch},))

    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(exported, Path(folder) / "net.pt2")
        torch.save(more, Path(folder) / "x.pt")
        # -I: a Python that looks neither in PYTHONPATH nor in the current folder.
        subprocess.run([sys.executable, "-I", "-c", ELSEWHERE], cwd=folder, check=True)
        got = torch.load(Path(folder) / "out.pt")

    print(f"largest output: {expected.abs().max():.3g}")
    print(f"largest difference from the fused net: {(got - expected).abs().max():.3g}")


if __name__ == "__main__":
    main()
