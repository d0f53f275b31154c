"""Images in PNG and JPEG files: one, or a folder with a folder of them per class. They are read by Pillow."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from resnet.data.sets import DatasetError, ImageSet
from resnet.kernels.host.command import ConfigError, one_line

if TYPE_CHECKING:  # an extra: who has no image files does without
    from PIL.Image import Image

TRAIN, TESTS = "train", ("test", "val")
_LAYOUT = "expected train/<class>/<image>.png or .jpg, and likewise test/ or val/"


class ImageError(ValueError):
    """A file cannot be used as an image; the message is the reason."""


def require_pillow(name: str) -> None:
    """ConfigError, which starts with the name of what needs it, where Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ConfigError(f"{name}: reading images needs Pillow: pip install pillow") from None


def read_image(path: str | os.PathLike[str], ground: str = "black") -> Image:
    """A PNG or JPEG file in red, green and blue, as its camera held it. Transparent pixels get the colour `ground`.

    ImageError where the file is no such image.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # gigabytes, once unpacked
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                return _on_ground(image, ground)
    except Image.UnidentifiedImageError:
        raise ImageError("it is no PNG or JPEG image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("it has too many pixels") from None
    except OSError as error:
        raise ImageError(error.strerror or "it is damaged") from None
    except Exception:  # of a damaged file Pillow's readers raise whatever they stumble over
        raise ImageError("it is damaged") from None


def _on_ground(image: Image, ground: str) -> Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)  # a camera's files lie on their side, with a note that says so
    if image.mode.startswith("I"):  # 16 bits, of which a conversion would keep those below 256
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA")).convert("RGB")


# ---- a folder ----------------------------------------------------------------------------------------------------


def holds_images(folder: Path) -> bool:
    """Whether a folder has one of the folders that `read_folder` looks for."""
    return any(os.path.isdir(folder / part) for part in (TRAIN, *TESTS))


def read_folder(folder: Path) -> ImageSet:
    """The images in train/<class>/ and test/<class>/ (or val/) of a folder, all square and of one size.

    The classes are train's, by their names. Where no image has a colour, the set is grey. Images of the classes take
    turns, so that the first ones are of all classes. Names that start with a dot are passed over.

    DatasetError, which names the file, where one is not as it has to be; ConfigError where Pillow is missing.
    """
    require_pillow("--data")
    test = next((part for part in TESTS if os.path.isdir(folder / part)), TESTS[0])
    train_files, test_files = _files_by_class(folder / TRAIN), _files_by_class(folder / test)
    classes = list(train_files)
    if len(classes) < 2:
        raise DatasetError(f"{folder / TRAIN}: expected two classes or more, got {len(classes)}; {_LAYOUT}")
    if not test_files:
        raise DatasetError(f"{folder / test}: no classes; {_LAYOUT}")
    for name in test_files:
        if name not in train_files:
            raise DatasetError(f"{folder / test / name}: no class of train; expected one of {', '.join(classes)}")
    train, test = _by_turns(train_files, classes), _by_turns(test_files, classes)
    pixels = _read_all([path for path, _ in (*train, *test)])
    train_images, test_images = pixels.split([len(train), len(test)])
    train_labels, test_labels = (torch.tensor([label for _, label in part]) for part in (train, test))
    names = tuple(one_line(name) for name in classes)
    return ImageSet(train_images, train_labels, test_images, test_labels, str(folder), names)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    files = {path.name: list(_entries(path)) for path in _entries(folder)}
    for name, paths in files.items():
        if not paths:
            raise DatasetError(f"{folder / name}: an empty class; expected PNG or JPEG images in it")
    return files


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder, by name, without what is hidden."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read ({error.strerror}); {_LAYOUT}") from None
    return (folder / name for name in names if not name.startswith("."))


def _by_turns(files: Mapping[str, Sequence[Path]], classes: Sequence[str]) -> list[tuple[Path, int]]:
    """(file, label): the first of each class, then the second of each, and so on."""
    labelled = ([(path, label) for path in files.get(name, ())] for label, name in enumerate(classes))
    return [each for turn in itertools.zip_longest(*labelled) for each in turn if each is not None]


def _read_all(paths: Sequence[Path]) -> Tensor:
    """uint8 (N, S, S) where no image has a colour, else (N, S, S, 3)."""
    pixels = np.empty((0,))
    for number, path in enumerate(tqdm(paths, desc="reading images", unit="img")):
        try:
            image = np.asarray(read_image(path))
        except ImageError as error:
            raise DatasetError(f"{path}: {error}; expected a PNG or JPEG image") from None
        height, width = image.shape[:2]
        if number == 0:
            if height != width:
                raise DatasetError(f"{path}: {width}x{height} pixels; expected a square image")
            pixels = np.empty((len(paths), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            size = pixels.shape[1]
            raise DatasetError(f"{path}: {width}x{height} pixels; expected {size}x{size}, as {paths[0]} has")
        pixels[number] = image
    is_grey = all((image == image[..., :1]).all() for image in pixels)  # one at a time: no second copy of the set
    return torch.from_numpy(np.ascontiguousarray(pixels[..., 0]) if is_grey else pixels)
