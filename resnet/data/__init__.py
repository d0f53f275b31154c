"""Fashion-MNIST, and batches of it on the training device."""

from resnet.data.batches import Batches
from resnet.data.files import DatasetError, FashionMNIST, fetch, load

__all__ = ["Batches", "DatasetError", "FashionMNIST", "fetch", "load"]
