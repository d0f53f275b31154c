"""What a run leaves on the disk, read back: nothing in it is run, and what does not fit is refused in one line."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from resnet.commands import ConfigError

FORMAT = 1
KEYS = {"format", "model", "optimizer", "scaler", "epoch", "step", "tally", "history", "args"}


def read_checkpoint(path: str, device: torch.device) -> dict[str, Any]:
    """The checkpoint of an earlier run, its tensors on the device. ConfigError, which says why, where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is refused anyway
            found = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from None
    except Exception as error:  # of a damaged file PyTorch's reader raises whatever it stumbles over
        refused = isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)
        reason = "it holds more than weights and settings, and what may run code is not read"
        raise _refusal(path, reason if refused else "it is truncated, or no checkpoint") from None
    if not isinstance(found, dict) or not {"model", "args"} <= found.keys():
        raise _refusal(path, "another program wrote it")
    if found.get("format", 0) > FORMAT:
        raise _refusal(path, "a newer version wrote it")
    if not found.keys() >= KEYS:
        raise _refusal(path, "a version wrote it that kept too little to go on")
    return found


def check_settings(path: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ConfigError, which names them, where settings are not those of the checkpoint's run."""
    changed = [
        f"--{name.replace('_', '-')} {saved.get(name)}, not {v}" for name, v in given.items() if saved.get(name) != v
    ]
    if changed:
        raise _refusal(path, f"its run has {'; '.join(changed)}")


def _refusal(path: str, reason: str) -> ConfigError:
    return ConfigError(f"--resume: cannot go on from {path}: {reason}")
