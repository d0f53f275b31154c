"""The command that says what is in images: `python -m resnet.predict --help`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from resnet.checkpoints import read_net
from resnet.commands import ConfigError, find_device
from resnet.data import CLASSES, IMAGE_SIZE, Batches
from resnet.kernels.host.command import Parser, one_line, put, run
from resnet.training import EVALUATION_BATCH

if TYPE_CHECKING:  # an extra: the other commands do without
    from PIL.Image import Image

MOST_LIKELY = 3  # classes that are printed


def _parser() -> Parser:
    parser = Parser(
        prog="python -m resnet.predict",
        description="Prints, for each image, the three classes of Fashion-MNIST that a saved net finds most likely, "
        "with their probabilities. Images may be of any size, and of several: each is made grey, scaled to fit "
        f"{IMAGE_SIZE}x{IMAGE_SIZE} pixels on a dark ground, as the data set's are, and then resized as in training.",
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
    images = torch.stack([read_image(path, arguments.invert) for path in arguments.images])
    saved = read_net(arguments.checkpoint, device)
    unknown = torch.zeros(len(images), dtype=torch.int64)
    batches = Batches(images, unknown, EVALUATION_BATCH, device=device, resize=saved.resize)
    probabilities = saved.logits(x for x, _ in batches).softmax(1)
    put("\n".join(f"{one_line(path)}: {most_likely(of)}" for path, of in zip(arguments.images, probabilities)))
    return 0


def most_likely(probabilities: Tensor, names: Sequence[str] = CLASSES) -> str:
    """The classes of the highest probabilities, the highest first."""
    values, classes = probabilities.topk(MOST_LIKELY)
    return ", ".join(f"{names[k]} {p:.3f}" for p, k in zip(values.tolist(), classes.tolist()))


def read_image(path: str, invert: bool = False) -> Tensor:
    """A PNG or JPEG file as the data set has its images: uint8 (28, 28), light on dark. ConfigError where it is none.

    What is transparent is ground. An image that is no square is not distorted: there is ground beside it.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("IMAGE: reading images needs Pillow: pip install pillow") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # gigabytes, once unpacked
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                return torch.from_numpy(np.array(_as_in_the_set(image, invert)))
    except Image.UnidentifiedImageError:
        raise _refusal(path, "it is no PNG or JPEG image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _refusal(path, "it has too many pixels") from None
    except OSError as error:
        raise _refusal(path, error.strerror or "it is damaged") from None
    except Exception:  # of a damaged file Pillow's readers raise whatever they stumble over
        raise _refusal(path, "it is damaged") from None


def _refusal(path: str, reason: str) -> ConfigError:
    return ConfigError(f"IMAGE: cannot use {path}: {reason}")


def _as_in_the_set(image: Image, invert: bool) -> Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)  # a camera's files lie on their side, with a note that says so
    if image.mode.startswith("I"):  # 16 bits, of which a conversion would keep those below 256
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    ground = Image.new("RGBA", image.size, "white" if invert else "black")
    grey = Image.alpha_composite(ground, image.convert("RGBA")).convert("L")
    if invert:
        grey = ImageOps.invert(grey)
    return ImageOps.pad(grey, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, color=0)


if __name__ == "__main__":
    sys.exit(main())
