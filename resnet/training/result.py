"""The figures of a training run: as lines, as a table, as JSON."""

from __future__ import annotations

import dataclasses
import math
import platform
from typing import Any

import torch

from resnet.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One whole epoch: mean loss and accuracies as fractions, and what its training steps took."""

    loss: float
    train_acc: float
    test_acc: float
    examples: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Figures of a run. The properties are those of the last whole epoch, or NaN where there is none."""

    config: TrainConfig
    device: str  # such as cuda:0
    device_name: str
    processes: int
    cuda_graph: bool  # whether the steps of whole batches were replays of a CUDA graph
    data: str  # where the images came from
    warm_up_seconds: float  # compilation and choice of algorithms, before the clock started
    epochs: tuple[Epoch, ...]
    interrupted: bool  # by a signal
    checkpoint: str | None  # where the weights are
    signal: str | None = None  # that interrupted it: SIGINT for Ctrl-C, SIGTERM, SIGHUP

    @property
    def loss(self) -> float:
        return self.epochs[-1].loss if self.epochs else math.nan

    @property
    def train_acc(self) -> float:
        return self.epochs[-1].train_acc if self.epochs else math.nan

    @property
    def test_acc(self) -> float:
        return self.epochs[-1].test_acc if self.epochs else math.nan

    @property
    def examples_per_sec(self) -> float:
        """Examples of all whole epochs by the time that their training steps took."""
        if not self.epochs:
            return math.nan
        return sum(e.examples for e in self.epochs) / self.train_seconds

    @property
    def train_seconds(self) -> float:
        """What the training steps of all whole epochs took, without warm-up and evaluation."""
        return sum(e.seconds for e in self.epochs)

    def summary(self) -> str:
        """Two lines, in the textbook's form; the second says what ran: a device, a CUDA graph, several processes."""
        where = self.device + (" as a CUDA graph" if self.cuda_graph else "")
        if self.processes > 1:
            where = f"{self.processes} processes ({torch.device(self.device).type})"
        return (
            f"loss {self.loss:.3f}, train acc {self.train_acc:.3f}, test acc {self.test_acc:.3f}\n"
            f"{self.examples_per_sec:.1f} examples/sec on {where}"
        )

    def table(self) -> str:
        """A line per whole epoch; its seconds are those of its training steps."""
        lines = [f"{'epoch':>5}{'loss':>9}{'train acc':>11}{'test acc':>10}{'seconds':>10}"]
        for number, e in enumerate(self.epochs, 1):
            lines.append(f"{number:>5}{e.loss:>9.3f}{e.train_acc:>11.3f}{e.test_acc:>10.3f}{e.seconds:>10.2f}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All of it, with versions, as JSON's types. NaN, which JSON has not, becomes None."""
        figures = {name: getattr(self, name) for name in ("loss", "train_acc", "test_acc", "examples_per_sec")}
        return {
            **{name: None if math.isnan(value) else value for name, value in figures.items()},
            **dataclasses.asdict(self),
            "recipe": dataclasses.asdict(self.config.plan),
            "train_seconds": self.train_seconds,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """What figures depend on beside this package."""
    return {"python": platform.python_version(), "torch": torch.__version__}
