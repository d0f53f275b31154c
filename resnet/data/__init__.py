"""Fashion-MNIST, and batches of it on the training device."""

from resnet.data.augmentation import Augmentation
from resnet.data.batches import Batches
from resnet.data.files import CLASSES, IMAGE_SIZE, DatasetError, FashionMNIST, fetch, load

__all__ = ["CLASSES", "IMAGE_SIZE", "Augmentation", "Batches", "DatasetError", "FashionMNIST", "fetch", "load"]
