"""Recipes: the numbers with which a net is trained, and the parts of PyTorch that they set."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from resnet.data import Augmentation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train; by default as the textbook does. The command's options of the first six names override them."""

    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.05  # with a warm-up: the highest
    resize: int = 96  # pixels
    dtype: str = "float32"  # bfloat16: where the device computes in it, else float32
    stem: str = "textbook"  # of resnet.reference.STEMS

    whole_batches: bool = False  # leave out of each epoch what fills no batch
    warm_up: float = 0.0  # part of all steps in which the rate rises, before it falls along a cosine; 0: it is constant
    momentum: float = 0.0  # Nesterov's
    weight_decay: float = 0.0  # of convolutions' and the linear layer's weights alone
    label_smoothing: float = 0.0
    augmentation: Augmentation | None = None
    average: float = 0.0  # window of the weights' moving average, which is evaluated, as a part of all steps; 0: none


OVERRIDABLE = ("epochs", "batch_size", "lr", "resize", "dtype", "stem")

_MODERN = Recipe(
    resize=28,
    dtype="bfloat16",
    stem="small",
    whole_batches=True,
    momentum=0.9,
    weight_decay=5e-4,
    label_smoothing=0.1,
    average=0.03,
)
RECIPES = {
    "textbook": Recipe(),
    # Made for a short time to 94% on one GPU.
    "fast": dataclasses.replace(
        _MODERN, epochs=12, batch_size=512, lr=0.4, warm_up=0.2, augmentation=Augmentation(shift=1, flip=True)
    ),
    # Made for test accuracy.
    "best": dataclasses.replace(
        _MODERN, epochs=60, batch_size=256, lr=0.2, warm_up=0.1, augmentation=Augmentation(shift=2, flip=True, erase=8)
    ),
}


def warm_up_steps(recipe: Recipe, steps: int) -> int:
    """How many of all steps the rate rises in."""
    return math.ceil(recipe.warm_up * steps)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of one of `steps` steps, counted from 0: rising on a line, then falling along half a cosine."""
    if not recipe.warm_up:
        return recipe.lr
    rising = warm_up_steps(recipe, steps)
    if step < rising:
        return recipe.lr * (step + 1) / rising
    return recipe.lr * (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising))) / 2


def optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.SGD:
    """SGD, all of whose state exists, so that a CUDA graph's first replay is as any other.

    The learning rate is a tensor: a graph keeps a number as it was at the capture. The fused step alone reads it on
    the device.
    """
    parameters = list(net.parameters())
    lr = torch.tensor(recipe.lr, dtype=torch.float32, device=parameters[0].device)
    groups = parameters
    if recipe.weight_decay:
        # Not of vectors, norms' weights and biases: a smaller one makes no simpler function.
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1]},
        ]
    sgd = torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)
    if recipe.momentum:
        # PyTorch would make them in the first step, and leave them unwritten where the loss scaler skips that one.
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


class WeightAverage:
    """A copy of a net whose weights and statistics are a moving average of that net's.

    `torch.optim.swa_utils.AveragedModel` is not used: its update asks the device whether it is the first one.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.net = copy.deepcopy(net).requires_grad_(False)
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        self._floats = _transposed([pair for pair in pairs if pair[0].is_floating_point()])
        self._counts = _transposed([pair for pair in pairs if not pair[0].is_floating_point()])
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Move towards the net's weights as they are; nothing waits for the device."""
        self._average(*self._floats, None)
        torch._foreach_copy_(*self._counts)


def _transposed(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def weight_average(recipe: Recipe, net: nn.Module, steps: int) -> WeightAverage | None:
    """The average that the recipe evaluates; at the end of all steps the first weights count for nothing in it."""
    return WeightAverage(net, max(0.0, 1 - 1 / (recipe.average * steps))) if recipe.average else None
