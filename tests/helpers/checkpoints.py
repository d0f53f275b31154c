"""Checkpoints of nets that were hardly trained, and what is no checkpoint, for the commands that read one."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from resnet import resnet18
from resnet.training import TrainConfig, TrainResult, train

IMAGES = 16  # of the test set


def train_tiny(path: Path, **changes: Any) -> TrainResult:
    """Two steps of an eager net on a few images of 33x33; its checkpoint is at the path."""
    settings = {"impl": "eager", "epochs": 1, "batch_size": 8, "resize": 33, "lr": 0.01, "limit_train": 16}
    return train(TrainConfig(**{**settings, "limit_test": IMAGES, "device": "cpu", "save": str(path), **changes}))


def save_untrained(path: Path) -> Path:
    """What a command needs of a checkpoint of an eager net for images of 33x33, with first weights."""
    settings = dataclasses.asdict(TrainConfig(impl="eager", resize=33, device="cpu"))
    torch.save({"model": resnet18().state_dict(), "args": settings, "epoch": 0}, path)
    return path


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint's copy in which something was changed."""
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def as_fused(content: dict[str, Any]) -> None:
    content["args"]["impl"] = "fused"


def as_earlier(content: dict[str, Any]) -> None:
    """As a version wrote it that had one net, and called what ran it its model, and took the stem from the recipe."""
    content["args"]["model"] = content["args"].pop("impl")
    del content["args"]["stem"], content["args"]["sync_batch_norm"]


def as_small(content: dict[str, Any]) -> None:
    """Another net, of first weights, with the small stem."""
    content["args"].update(recipe="best", resize=28, stem="small")
    content["model"] = resnet18(stem="small").state_dict()


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def _damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"text",
        "a plain pickle that runs code": pickle.dumps(RunsCode()),
    }


NO_CHECKPOINT = "it is truncated, or no checkpoint"
RUNS_CODE = "it holds more than weights and settings, and what may run code is not read"
ANOTHER_NET = "it is of another net"
ANOTHER_VERSION = "its settings are none of this version"

CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda saved: saved.update(format=2), "a newer version wrote it"),
    "another library's": (lambda saved: saved.pop("args"), "another program wrote it"),
    "runs code": (lambda saved: saved.update(extra=RunsCode()), RUNS_CODE),
    "another architecture": (lambda saved: saved["model"].update({"7.bias": torch.zeros(100)}), ANOTHER_NET),
    "no weights": (lambda saved: saved.update(model={}), ANOTHER_NET),
    "a list of weights": (lambda saved: saved.update(model=[1]), ANOTHER_NET),
    "another recipe": (lambda saved: saved["args"].update(recipe="none"), ANOTHER_VERSION),
    "a list for a recipe": (lambda saved: saved["args"].update(recipe=[]), ANOTHER_VERSION),
    "a text for a version": (lambda saved: saved.update(format="new"), "another program wrote it"),
    "no size": (lambda saved: saved["args"].update(resize="large"), ANOTHER_VERSION),
    "no settings": (lambda saved: saved.update(args=[]), ANOTHER_VERSION),
}


def bad_checkpoints(good: Path) -> list[tuple[str, str]]:
    """(path, why it is refused) of files in the current folder, made of a good one."""
    made = []
    whole = torch.load(good, weights_only=True)
    for number, (change, reason) in enumerate(CHANGES.values()):
        weights = dict(whole["model"]) if reason == ANOTHER_NET else {}  # which take long to write
        content = {**whole, "model": weights, "optimizer": {}, "args": dict(whole["args"])}
        change(content)
        torch.save(content, f"{number}.pt")
        made.append((f"{number}.pt", reason))
    for name, content in _damaged(good.read_bytes()).items():
        Path(name).write_bytes(content)
        made.append((name, NO_CHECKPOINT))
    Path("folder").mkdir()
    return [*made, ("folder", "Is a directory"), ("nowhere.pt", "No such file or directory")]
