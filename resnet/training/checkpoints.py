"""What a run leaves on the disk, read back: nothing in it is run, and what does not fit is refused in one line."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resnet.commands import DTYPES, LARGEST, ConfigError
from resnet.data import FASHION_MNIST, IMAGE_SIZE, ImageSpec
from resnet.models import BUILDERS, OLD_MODEL
from resnet.reference import STEMS
from resnet.training.recipes import RECIPES
from resnet.training.result import Epoch

FORMAT = 1
KEYS = {"format", "model", "optimizer", "scaler", "epoch", "step", "tally", "history", "args"}

_GO_ON = "--resume: cannot go on from"
_USE = "CHECKPOINT: cannot use"
_ANOTHER_NET = "it is of another net"
_ANOTHER_VERSION = "its settings are none of this version"


def read_checkpoint(path: str, device: torch.device) -> dict[str, Any]:
    """The checkpoint of an earlier run, its tensors on the device. ConfigError, which says why, where it is none."""
    found = _read(path, device, _GO_ON)
    if not found.keys() >= KEYS:
        raise _refusal(_GO_ON, path, "a version wrote it that kept too little to go on")
    if not isinstance(found["args"], dict):
        raise _refusal(_GO_ON, path, _ANOTHER_VERSION)
    if not _is_progress(**{name: found[name] for name in ("epoch", "step", "tally", "history")}):
        raise _refusal(_GO_ON, path, "what it says of its run's progress is nothing of this version")
    return found


def _is_progress(epoch: object, step: object, tally: object, history: object) -> bool:
    """Whether these are epochs that were trained in full, steps and what they gave, and the figures of the epochs."""
    figures = {field.name for field in dataclasses.fields(Epoch)}
    if not all(type(count) is int and count >= 0 for count in (epoch, step)):
        return False
    # One epoch may not have been evaluated yet.
    if not isinstance(history, list) or len(history) not in (epoch, epoch - 1):
        return False
    for each in history:
        if not (isinstance(each, dict) and each.keys() == figures):
            return False
        if not all(isinstance(value, int | float) for value in each.values()):
            return False
    match tally:
        case {"losses": Tensor() as losses, "sizes": Tensor() as sizes, "correct": Tensor(), "seen": int(), **rest}:
            return losses.dim() == 1 and losses.shape == sizes.shape and step <= len(losses) and [*rest] == ["seconds"]
    return False


@dataclasses.dataclass(frozen=True)
class SavedNet:
    """A net as the run that saved it evaluated it, in evaluation mode."""

    net: nn.Module
    device: torch.device  # where it is
    model: str
    impl: str
    recipe: str
    resize: int
    dtype: str
    images: ImageSpec  # that it was trained on
    epoch: int  # trained in full

    def logits(self, images: Iterable[Tensor]) -> Tensor:
        """What the net says of batches (B, C, resize, resize) on its device: float32 (N, classes) on the CPU."""
        dtype = DTYPES[self.dtype]
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return torch.cat([self.net(x).float() for x in images]).cpu()


def read_net(path: str, device: torch.device) -> SavedNet:
    """The net that a run has saved, on the device. ConfigError, which says why, where there is none."""
    found = _read(path, device, _USE)
    settings = found["args"]
    if not _are_known(settings):
        raise _refusal(_USE, path, _ANOTHER_VERSION)
    images, build = _images(found, path, _USE), BUILDERS[settings["model"], settings["impl"]]
    net = build(len(images.classes), images.channels, stem=settings["stem"])
    try:
        net.load_state_dict(found["model"])
    except (RuntimeError, TypeError, AttributeError):  # the keys, the sizes or the types are others
        raise _refusal(_USE, path, _ANOTHER_NET) from None
    return SavedNet(
        net.to(device, memory_format=torch.channels_last).eval(),
        device,
        **{name: settings[name] for name in ("model", "impl", "recipe", "resize", "dtype")},
        images=images,
        epoch=found["epoch"],
    )


def _images(checkpoint: Mapping[str, Any], path: str, purpose: str) -> ImageSpec:
    """What a checkpoint's net was trained on: Fashion-MNIST where it says nothing, as older versions did."""
    match checkpoint.get("images", dataclasses.asdict(FASHION_MNIST)):
        case {"classes": [_, *_] as classes, "channels": int(channels), "size": int(size)} if channels in (1, 3):
            named = all(isinstance(name, str) for name in classes)
            if named and channels is not True and 1 <= size <= checkpoint["args"]["resize"]:
                return ImageSpec(tuple(classes), channels, size)
    raise _refusal(purpose, path, "what it says of its images is nothing of this version")


def _are_known(settings: Any) -> bool:
    """Whether a checkpoint's settings say which net its weights are of, and for which images."""
    if not isinstance(settings, dict):
        return False
    resize = settings.get("resize")
    return (
        (settings.get("model"), settings.get("impl")) in tuple(BUILDERS)  # not all that a file holds can be a key
        and settings.get("recipe") in tuple(RECIPES)
        and settings.get("dtype") in tuple(DTYPES)
        and settings.get("stem") in STEMS
        and isinstance(resize, int)
        and IMAGE_SIZE <= resize <= LARGEST
    )


def _read(path: str, device: torch.device, purpose: str) -> dict[str, Any]:
    """What any use of a checkpoint needs: weights and settings that this version understands."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is refused anyway
            found = torch.load(path, map_location=device, weights_only=True)
        damaged = _damaged_part(path)
    except OSError as error:
        raise _refusal(purpose, path, error.strerror or str(error)) from None
    except Exception as error:  # of a damaged file PyTorch's reader raises whatever it stumbles over
        refused = isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)
        reason = "it holds more than weights and settings, and what may run code is not read"
        raise _refusal(purpose, path, reason if refused else "it is truncated, or no checkpoint") from None
    if damaged:
        raise _refusal(purpose, path, f"it is damaged: {damaged} in it is not what was written")
    version = found.get("format", 0) if isinstance(found, dict) else None
    if not isinstance(version, int) or not {"model", "args", "epoch"} <= found.keys():
        raise _refusal(purpose, path, "another program wrote it")
    if version > FORMAT:
        raise _refusal(purpose, path, "a newer version wrote it")
    if isinstance(found["args"], dict):
        found["args"] = _completed(found["args"])
    return found


def _damaged_part(path: str) -> str | None:
    """The name of what is not as it was written, by the sums that the file has and PyTorch does not ask for."""
    if not zipfile.is_zipfile(path):  # as PyTorch wrote long ago
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with those that earlier versions did not have."""
    if "impl" not in settings:  # there was one net, and this was called its model
        settings = {**settings, "model": OLD_MODEL, "impl": settings.get("model")}
    recipe = settings.get("recipe")
    stem = RECIPES[recipe].stem if recipe in tuple(RECIPES) else None
    return {"stem": stem, "sync_batch_norm": False, **settings}


def check_settings(path: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ConfigError, which names them, where settings are not those of the checkpoint's run."""
    changed = [
        f"--{name.replace('_', '-')} {saved.get(name)}, not {v}" for name, v in given.items() if saved.get(name) != v
    ]
    if changed:
        raise _refusal(_GO_ON, path, f"its run has {'; '.join(changed)}")


def check_processes(path: str, saved: Mapping[str, Any], given: int) -> None:
    """ConfigError where other processes share the batches than those of the checkpoint's run."""
    processes = saved.get("processes", 1)  # earlier versions had one
    if processes != given:
        raise _refusal(_GO_ON, path, f"its run has {processes} processes, not {given}")


def check_images(path: str, saved: Mapping[str, Any], given: ImageSpec) -> None:
    """ConfigError where the images are not as those of the checkpoint's run."""
    spec = _images(saved, path, _GO_ON)
    if spec != given:
        raise _refusal(_GO_ON, path, f"its run has {spec}, not {given}")


def check_progress(path: str, saved: Mapping[str, Any], epochs: int, images: int, steps: int) -> None:
    """ConfigError where an epoch has other images or steps, or the checkpoint's run has trained for longer already."""
    found = saved.get("train_images")  # which earlier versions did not say
    other_steps = len(saved["tally"]["losses"]) != steps
    if found not in (None, images) or (found is None and other_steps):
        raise _refusal(_GO_ON, path, f"its run has {found or 'another number of'} training images, not {images}")
    if other_steps:
        raise _refusal(_GO_ON, path, f"its run has {len(saved['tally']['losses'])} steps an epoch, not {steps}")
    epoch, step = saved["epoch"], saved["step"]
    if (epoch, step) > (epochs, 0):
        raise _refusal(
            _GO_ON, path, f"its run has {epoch} epochs and {step} steps, which --epochs {epochs} is short of"
        )


def another_net(path: str) -> ConfigError:
    """The error for a checkpoint of --resume whose weights do not fit."""
    return _refusal(_GO_ON, path, _ANOTHER_NET)


def _refusal(purpose: str, path: str, reason: str) -> ConfigError:
    return ConfigError(f"{purpose} {path}: {reason}")
