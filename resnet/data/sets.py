"""What a set of images is, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IMAGE_SIZE = 28  # of Fashion-MNIST's images
CLASSES = (  # as the textbook names Fashion-MNIST's labels from 0 to 9
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class DatasetError(RuntimeError):
    """A data file is missing or is not what it has to be; the message names the file and what was expected."""


@dataclass(frozen=True)
class ImageSpec:
    """What a net is made for: the names of its classes, and how its images are. By default Fashion-MNIST's."""

    classes: tuple[str, ...] = CLASSES
    channels: int = 1  # 1: grey; 3: red, green and blue
    size: int = IMAGE_SIZE  # height and width, in pixels, before they are enlarged

    def __str__(self) -> str:
        colour = "grey" if self.channels == 1 else "colour"
        return f"{colour} images of {self.size}x{self.size} in {len(self.classes)} classes ({', '.join(self.classes)})"


FASHION_MNIST = ImageSpec()


@dataclass(frozen=True)
class ImageSet:
    """Images on the CPU: uint8 (N, S, S) where they are grey, else (N, S, S, 3). Labels, int64 (N,), count `classes`.

    `source` says where they came from: a folder, or "embedded sample".
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str
    classes: tuple[str, ...] = CLASSES

    @property
    def spec(self) -> ImageSpec:
        _, size, _, *channels = self.train_images.shape
        return ImageSpec(self.classes, *(channels or [1]), size)
