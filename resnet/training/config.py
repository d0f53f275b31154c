"""The settings of a training run, which are those of the command; what is out of its range is refused."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from resnet.commands import (
    DTYPES,
    ConfigError,
    check_outputs,
    check_plot,
    check_tensorboard,
    find_device,
    require,
    require_count,
)
from resnet.data import IMAGE_SIZE
from resnet.kernels.host.command import say
from resnet.models import IMPLS, MODELS, OLD_MODEL
from resnet.reference import STEMS
from resnet.training.recipes import OVERRIDABLE, RECIPES, Recipe

CUDA_GRAPHS = ("auto", "on", "off")
PATHS = ("data", "save", "json", "log", "tensorboard", "profile", "plot", "resume")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; the command's options under the same names.

    A setting of OVERRIDABLE that is None becomes the recipe's in the constructor. So `dataclasses.replace` with another
    recipe keeps what the first one gave.

    A `pathlib.Path` becomes the text that names it.

    A `model` that was one of IMPLS, as in earlier versions, becomes `impl`, and a line on stderr says so.

    Raises ConfigError for a value out of its range. What depends on the machine and the data (device, folder, limits)
    is checked by `train`, before it does anything.
    """

    model: str = "resnet18"  # one of MODELS
    impl: str = None  # type: ignore[assignment]  # eager, fused, or compile: torch.compile of eager; None: fused
    recipe: str = "textbook"  # one of RECIPES
    epochs: int = None  # type: ignore[assignment]
    batch_size: int = None  # type: ignore[assignment]
    lr: float = None  # type: ignore[assignment]
    resize: int = None  # type: ignore[assignment]  # pixels
    device: str = "auto"  # cpu, cuda, cuda:N; auto: cuda where there is one
    dtype: str = None  # type: ignore[assignment]  # other than float32: autocast to it
    stem: str = None  # type: ignore[assignment]  # one of STEMS
    cuda_graph: str = "auto"  # on: replay whole batches' steps as a CUDA graph; auto: where that can be
    seed: int = 0
    data: str | None = None  # folder, of Fashion-MNIST or of images; None: see resnet.data.load
    limit_train: int | None = None  # only so many images, the first ones; None: all
    limit_test: int | None = None
    save: str | None = None  # checkpoint, written after every epoch
    json: str | None = None  # figures of the run
    log: str | None = None  # lines of JSON, one per epoch, written as the run goes
    log_every: int | None = None  # and one per so many steps
    tensorboard: str | None = None  # folder for TensorBoard's scalars, per epoch and per log_every steps
    sync_batch_norm: bool = False  # of several processes: statistics of the whole batch, not of each one's share
    profile: str | None = None  # trace of some of the first epoch's steps
    plot: str | None = None  # picture of loss and accuracies, drawn after every epoch
    resume: str | None = None  # checkpoint of a run with the same settings, which goes on from there

    def __post_init__(self) -> None:
        for name in PATHS:
            if getattr(self, name) is not None:  # as text, since JSON and checkpoints have no paths
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if self.impl is None:
            self._choose_impl()
        require(self.model in MODELS, "--model", f"one of {', '.join(MODELS)}", self.model)
        require(self.impl in IMPLS, "--impl", f"one of {', '.join(IMPLS)}", self.impl)
        require(self.recipe in RECIPES, "--recipe", f"one of {', '.join(RECIPES)}", self.recipe)
        for name in OVERRIDABLE:
            if getattr(self, name) is None:
                object.__setattr__(self, name, self._of_recipe(name))
        require_count("--epochs", self.epochs)
        require_count("--batch-size", self.batch_size)
        held = torch.finfo(torch.float32)
        require(held.tiny <= self.lr <= held.max, "--lr", "a positive number that float32 holds", self.lr)
        require(
            self.resize >= IMAGE_SIZE,
            "--resize",
            f"at least {IMAGE_SIZE}, the images' own size: they are enlarged only",
            self.resize,
        )
        require(self.resize < 2**15, "--resize", "at most 32767 pixels", self.resize)
        require(self.dtype in DTYPES, "--dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        require(self.stem in STEMS, "--stem", f"one of {', '.join(STEMS)}", self.stem)
        require(self.cuda_graph in CUDA_GRAPHS, "--cuda-graph", f"one of {', '.join(CUDA_GRAPHS)}", self.cuda_graph)
        require(0 <= self.seed < 2**63, "--seed", "a number from 0 to 2**63 - 1", self.seed)
        for name, limit in (("--limit-train", self.limit_train), ("--limit-test", self.limit_test)):
            require(limit is None or limit >= 1, name, "at least 1", limit)
        if self.log_every is not None:
            require_count("--log-every", self.log_every)
            where = self.log or self.tensorboard
            require(where is not None, "--log-every", "--log or --tensorboard, which say where", "none")
        check_plot(self.plot)
        reports = {"--json": self.json, "--log": self.log, "--plot": self.plot, "--profile": self.profile}
        check_outputs({"--save": self.save, **reports})
        check_tensorboard(self.tensorboard, {"--save": self.save, **reports})
        check_outputs(reports, {"--resume": self.resume})

    def _choose_impl(self) -> None:
        """`impl` where none is given: fused, or what earlier versions had in `model`."""
        impl = "fused"
        if self.model in IMPLS:
            impl = self.model
            say(f"--model {impl} is now --impl {impl}; --model names the net, here {OLD_MODEL}")
            object.__setattr__(self, "model", OLD_MODEL)
        object.__setattr__(self, "impl", impl)

    def _of_recipe(self, name: str) -> Any:
        value = getattr(RECIPES[self.recipe], name)
        return "float32" if value == "bfloat16" and not _computes_bfloat16(self.device) else value

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that decide the weights after each step: with a warm-up the number of epochs, too."""
        names = ["model", "impl", "recipe", "batch_size", "lr", "resize", "dtype", "stem", "seed", "limit_train"]
        names += ["sync_batch_norm", *(["epochs"] if self.plan.warm_up else [])]
        return {name: getattr(self, name) for name in names}

    @property
    def plan(self) -> Recipe:
        """The recipe, with what overrides it."""
        return dataclasses.replace(RECIPES[self.recipe], **{name: getattr(self, name) for name in OVERRIDABLE})


def _computes_bfloat16(name: str) -> bool:
    """Whether the device that --device names does, without emulation; a device that is absent does not."""
    try:
        device = find_device(name)
    except ConfigError:  # which `train` will say
        return False
    if device.type == "cpu":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
