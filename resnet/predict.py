"""The command that says what is in images: `python -m resnet.predict --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from resnet.commands import ConfigError, check_backend, find_device
from resnet.data import CLASSES, Batches, ImageSpec
from resnet.data.images import ImageError, read_image, require_pillow
from resnet.kernels.host.command import Parser, one_line, put, run
from resnet.training.checkpoints import read_net
from resnet.training.preparation import EVALUATION_BATCH

MOST_LIKELY = 3  # classes that are printed


def _parser() -> Parser:
    parser = Parser(
        prog="python -m resnet.predict",
        description="Prints, for each image, the three classes that a saved net finds most likely, with their "
        "probabilities. Images may be of any size, and of several: each is made grey where the net was trained on grey "
        "images, scaled to fit the size of these on a dark ground, and then resized as in training.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file that `python -m resnet.train --save` wrote")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="PNG or JPEG file")
    parser.add_argument("--invert", action="store_true", help="images are dark on light; the data set's are not")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 0; 2 for a checkpoint or an image that cannot be used, 130 after Ctrl-C."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    return run(parser, lambda: _predict(arguments))


def _predict(arguments: argparse.Namespace) -> int:
    device = find_device(arguments.device)
    saved = read_net(arguments.checkpoint, device)
    check_backend(saved.impl, device)
    images = torch.stack([image_for(saved.images, path, arguments.invert) for path in arguments.images])
    unknown = torch.zeros(len(images), dtype=torch.int64)
    batches = Batches(images, unknown, EVALUATION_BATCH, device=device, resize=saved.resize)
    probabilities = saved.logits(x for x, _ in batches).softmax(1)
    put(
        "\n".join(
            f"{one_line(path)}: {most_likely(of, saved.images.classes)}"
            for path, of in zip(arguments.images, probabilities)
        )
    )
    return 0


def most_likely(probabilities: Tensor, names: Sequence[str] = CLASSES) -> str:
    """The classes of the highest probabilities, the highest first."""
    values, classes = probabilities.topk(min(MOST_LIKELY, len(names)))
    return ", ".join(f"{names[k]} {p:.3f}" for p, k in zip(values.tolist(), classes.tolist()))


def image_for(images: ImageSpec, path: str, invert: bool = False) -> Tensor:
    """A PNG or JPEG file as the images that a net was trained on: uint8 (S, S) or (S, S, 3), light on dark.

    Transparent pixels become dark. An image that is no square is not distorted, but gets dark bars. ConfigError where
    the file is no image.
    """
    require_pillow("IMAGE")
    from PIL import Image, ImageOps

    try:
        image = read_image(path, ground="white" if invert else "black")
    except ImageError as error:
        raise ConfigError(f"IMAGE: cannot use {path}: {error}") from None
    if images.channels == 1:
        image = image.convert("L")
    if invert:
        image = ImageOps.invert(image)
    least = -(-max(image.size) // images.size)  # a thinner side would come to nothing
    image = image.resize([max(side, least) for side in image.size])
    image = ImageOps.pad(image, (images.size, images.size), Image.Resampling.BICUBIC, color=0)
    return torch.from_numpy(np.array(image))


if __name__ == "__main__":
    sys.exit(main())
