"""Training a ResNet, as `python -m resnet.train` does: a configuration in, a net and its figures out."""

from resnet.commands import ConfigError
from resnet.training.config import TrainConfig
from resnet.training.loop import NonFiniteError, UnfinishedError, train
from resnet.training.result import Epoch, TrainResult

__all__ = ["ConfigError", "Epoch", "NonFiniteError", "TrainConfig", "TrainResult", "UnfinishedError", "train"]
