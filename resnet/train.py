"""The command that trains a ResNet on Fashion-MNIST: `python -m resnet.train --help`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from resnet.commands import DTYPES, ConfigError, write_output
from resnet.data import DatasetError
from resnet.heap import keep_freed_memory
from resnet.kernels.host.command import Parser, RunError, ended_by, put, run, say
from resnet.models import IMPLS, MODELS
from resnet.ranks import Ranks
from resnet.reference import STEMS
from resnet.training import UnfinishedError, train
from resnet.training.config import CUDA_GRAPHS, TrainConfig
from resnet.training.recipes import RECIPES
from resnet.training.result import TrainResult


def _parser() -> Parser:
    default = TrainConfig()
    parser = Parser(
        prog="python -m resnet.train",
        description="Trains a ResNet on Fashion-MNIST, or on a folder of images, and prints its loss, accuracies and "
        "examples/sec. Loss and train acc are of the images as the recipe augments them; test acc is of the weights' "
        "average where the recipe keeps one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # No choices: TrainConfig takes what earlier versions had for --model too.
    parser.add_argument("--model", default=default.model, metavar=f"{{{','.join(MODELS)}}}", help="the net")
    parser.add_argument(
        "--impl",
        choices=IMPLS,
        default=argparse.SUPPRESS,
        help=f"what runs its blocks; compile: torch.compile of eager (default: {default.impl})",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default=default.recipe,
        help="textbook: d2l.ai's; fast: made for a short time to 94%% on a GPU; best: made for accuracy",
    )
    _add_overriding(parser, "--epochs", int, "passes over the training set")
    _add_overriding(parser, "--batch-size", int, "images per step")
    _add_overriding(parser, "--lr", float, "learning rate of SGD, the highest where it changes")
    _add_overriding(parser, "--resize", int, "height and width of the images, in pixels")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda or cuda:N")
    _add_overriding(
        parser,
        "--dtype",
        str,
        "other than float32: by autocast, as a recipe does on a device that has it",
        choices=DTYPES,
    )
    _add_overriding(
        parser,
        "--stem",
        str,
        "first stage: textbook, 7x7 with a pool, or small, 3x3, after which the blocks see 16 times the pixels",
        choices=STEMS,
    )
    parser.add_argument(
        "--cuda-graph",
        choices=CUDA_GRAPHS,
        default=default.cuda_graph,
        help="replay the steps of whole batches as a CUDA graph; auto: on a CUDA device, but not with --impl compile",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the first weights and the order of images")
    parser.add_argument(
        "--data",
        help="folder of Fashion-MNIST's four IDX files, searched and downloaded if not given; or one of PNG and JPEG "
        "images, as train/CLASS/NAME.png and test/CLASS/NAME.png",
    )
    parser.add_argument("--limit-train", type=int, metavar="N", help="only the first N training images")
    parser.add_argument("--limit-test", type=int, metavar="N", help="only the first N test images")
    parser.add_argument("--save", metavar="PATH", help="checkpoint, replaced after every epoch and at Ctrl-C")
    parser.add_argument("--resume", metavar="PATH", help="go on from a checkpoint of a run with the same settings")
    parser.add_argument("--json", metavar="PATH", help="figures of the run, per epoch and in all")
    parser.add_argument("--log", metavar="PATH", help="a line of JSON per epoch, as the run goes; --resume adds to it")
    parser.add_argument(
        "--log-every", type=int, metavar="N", help="and a line per N steps; --tensorboard gets them too"
    )
    parser.add_argument(
        "--tensorboard", metavar="DIR", help="scalars per epoch for TensorBoard, whose package it needs"
    )
    parser.add_argument(
        "--sync-batch-norm",
        action="store_true",
        help="of several processes: normalise by the statistics of the whole batch, not of each one's share",
    )
    parser.add_argument("--profile", metavar="PATH", help="PyTorch's trace of 5 of the first steps, as JSON for Chrome")
    parser.add_argument("--plot", metavar="PATH", help="loss and accuracies per epoch, drawn after each")
    return parser


def _add_overriding(parser: Parser, option: str, kind: type, meaning: str, **rest: Any) -> None:
    """An option whose default is the recipe's; where it is not given, it is not among the arguments."""
    name = option.removeprefix("--").replace("-", "_")
    of_recipes = ", ".join(f"{recipe}: {getattr(numbers, name)}" for recipe, numbers in RECIPES.items())
    parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=f"{meaning} ({of_recipes})", **rest)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 0; 1 for a non-finite loss or a file that cannot be written, 2 for what cannot be used,
    130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = _parser()
    return run(parser, lambda: _say_once(lambda: _train(TrainConfig(**vars(parser.parse_args(argv))))), _REFUSED)


_REFUSED = (DatasetError,)


def _say_once(work: Callable[[], int]) -> int:
    """The exit status of `work`; of several processes the first one alone says what it says, and what fails in all."""
    if Ranks.of_environment().rank == 0:
        return work()
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return work()
    except (ConfigError, *_REFUSED):
        return 2
    except RunError:
        return 1


def _train(config: TrainConfig) -> int:
    try:
        result = train(config)
    except UnfinishedError as error:
        _report(error.result, "not saved")
        raise
    _report(result)
    return ended_by(signal.Signals[result.signal]) if result.interrupted else 0


def _report(result: TrainResult, unsaved: str = "before the first step, nothing to save") -> None:
    """Prints and writes the figures; `unsaved` says why an interrupted run has left no checkpoint."""
    try:
        if result.epochs:
            with contextlib.suppress(OSError):  # of a terminal that was closed
                print(result.table(), file=sys.stderr, flush=True)
        if result.interrupted:
            saved = result.checkpoint and f"checkpoint in {result.checkpoint}"
            say(f"interrupted after {len(result.epochs)} epochs; {saved or unsaved}")
        elif result.epochs:
            put(result.summary())
    finally:
        if result.config.json is not None:
            write_output(result.config.json, (json.dumps(result.to_json(), indent=2) + "\n").encode())


if __name__ == "__main__":
    keep_freed_memory()  # for a process that is this command's alone
    sys.exit(main())
