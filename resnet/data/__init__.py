"""Fashion-MNIST or images of one's own, and batches of them on the training device."""

from resnet.data.augmentation import Augmentation
from resnet.data.batches import Batches
from resnet.data.files import fetch, load
from resnet.data.sets import CLASSES, FASHION_MNIST, IMAGE_SIZE, DatasetError, ImageSet, ImageSpec

__all__ = [
    "CLASSES",
    "FASHION_MNIST",
    "IMAGE_SIZE",
    "Augmentation",
    "Batches",
    "DatasetError",
    "ImageSet",
    "ImageSpec",
    "fetch",
    "load",
]
