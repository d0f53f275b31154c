"""What the package's commands share: arguments that are refused in one line, the device, files that can be written."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch


class ConfigError(ValueError):
    """A setting cannot be used; the message, one line, names it and what was expected."""


class Parser(argparse.ArgumentParser):
    """An error is one line, without the page of usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got}")


def find_device(name: str) -> torch.device:
    """The device that --device names: "auto" is the current GPU where there is one. ConfigError where it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    require(device.type == "cuda", "--device", "auto, cpu, cuda or cuda:N", name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(count > 0, "--device", "auto or cpu, since PyTorch finds no CUDA device here", name)
    index = torch.cuda.current_device() if device.index is None else device.index
    require(index < count, "--device", f"one of the {count} devices, cuda:0 to cuda:{count - 1}", name)
    return torch.device("cuda", index)


def check_writable(name: str, path: Path) -> None:
    """ConfigError unless a file can be written at `path`."""
    folder = path.parent
    require(folder.is_dir(), name, "a path in an existing folder", f"{path}; {folder} is no folder")
    require(not path.is_dir(), name, "a file's path", f"the folder {path}")
    require(os.access(folder, os.W_OK), name, "a path in a folder that may be written", path)
