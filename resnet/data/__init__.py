"""Fashion-MNIST, and batches of it on the training device."""

from resnet.data.batches import Batches
from resnet.data.files import IMAGE_SIZE, DatasetError, FashionMNIST, fetch, load

__all__ = ["IMAGE_SIZE", "Batches", "DatasetError", "FashionMNIST", "fetch", "load"]
