"""The command that times choices and compiles kernels ahead of a first training: `python -m resnet.tune --help`."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet import fuse, settings
from resnet.commands import DTYPES, check_outputs, find_device, logits_of, made_by, require, require_count
from resnet.kernels.host.command import ConfigError, Parser, run
from resnet.kernels.host.files import irregular
from resnet.kernels.tuning import memory, timing
from resnet.models import BUILDERS, MODELS

_PROGRESS_SECONDS = 5


def _parser() -> Parser:
    parser = Parser(
        prog="python -m resnet.tune",
        description="Runs a training step and an evaluation of a net on a GPU, so that the choices of its ways and "
        "tiles are timed and kept, and its kernels are compiled.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{', '.join(MODELS)} or module:callable, which is called for an nn.Module; resnet.fuse fuses it",
    )
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--size", type=int, default=96, help="height and width of the images, in pixels")
    parser.add_argument("--channels", type=int, default=1, help="of the images")
    parser.add_argument("--classes", type=int, default=10, help="outputs; a callable has its own")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="other than float32: by autocast")
    parser.add_argument("--train", action="store_true", help="the training step alone")
    parser.add_argument("--eval", action="store_true", help="the evaluation alone")
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:N")
    parser.add_argument("--choices", metavar="FILE", help="where choices are kept, in place of the user's own file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 0; 1 for too little memory or a file that cannot be read, 2 for what cannot be used."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    return run(parser, lambda: print(tune(arguments)) or 0)


def tune(arguments: argparse.Namespace) -> str:
    """What the command does with its arguments; a line that says where the choices are.

    All that can be chosen is compiled first, side by side; then choices are timed one by one.

    Raises:
        ConfigError: an argument, or a setting in the environment, cannot be used.
        torch.OutOfMemoryError: the device has not the memory for a step.
    """
    for name in ("batch", "size", "channels", "classes"):
        require_count(f"--{name}", getattr(arguments, name))
    require(memory.mode != "off", "FUSED_RESIDUAL_TUNING", "on or full, since nothing is timed otherwise", memory.mode)
    device = find_device(arguments.device)
    require(device.type in timing.CLOCKS, "--device", "a GPU, since nothing is timed on a CPU", device)
    try:
        settings.check_launchable()
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    choices = memory.process_choices
    path = choices.path if arguments.choices is None else Path(arguments.choices)
    require(path is not None, "--choices", "a file, since FUSED_RESIDUAL_CACHE is off", "none")
    if arguments.choices is not None:
        check_outputs({"--choices": path})
        kind = irregular(path)
        require(kind is None, "--choices", "a regular file, which is read too", f"the {kind} {path}")
    net = _net(arguments.model, arguments.channels, arguments.classes).to(device, memory_format=torch.channels_last)

    from resnet.kernels.host import launcher  # which needs Triton

    choices.path = path
    x = torch.rand(arguments.batch, arguments.channels, arguments.size, arguments.size, device=device)
    dtype = DTYPES[arguments.dtype]

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return logits_of(net, x)

    def training_step() -> None:
        net.train()
        forward().float().sum().backward()

    def evaluation() -> None:
        net.eval()
        with torch.no_grad():
            forward()

    parts = {"training step": training_step, "evaluation": evaluation}
    if arguments.train != arguments.eval:
        del parts["evaluation" if arguments.train else "training step"]
    with _progress() as report:
        with torch.autograd.set_multithreading_enabled(False):  # else backward would launch, from a thread of its own
            launcher.compile_ahead(parts.values())
        report("compilation")
        for name, run in parts.items():
            run()
            timing.synchronize(device)
            report(name)
    require(choices.path is not None, "--choices", "a file that can be written", path)
    return f"choices are in {path}"


def _net(model: str, channels: int, classes: int) -> nn.Module:
    """The net that MODEL names, fused; ConfigError where there is none."""
    if model in MODELS:
        return BUILDERS[model, "fused"](classes, channels)
    net = made_by(model, f"{', '.join(MODELS)} or module:callable")
    fuse(net)
    return net


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Inside, a line every few seconds in which kernels were compiled, and one for each part that is reported done."""
    from triton import knobs

    start = shown = time.perf_counter()
    compiled, known = 0, _choices()
    lock = threading.Lock()  # kernels are compiled in threads

    def show(part: str) -> None:
        nonlocal shown
        shown = time.perf_counter()
        figures = f"{_choices() - known} choices timed, {compiled} kernels compiled, {shown - start:.0f} s"
        print(f"{part}: {figures}", file=sys.stderr, flush=True)

    def listen(*, cache_hit: bool, **_: object) -> None:
        nonlocal compiled
        with lock:
            compiled += not cache_hit
            if time.perf_counter() - shown > _PROGRESS_SECONDS:
                show("so far")

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield show
    finally:
        knobs.compilation.listener = before


def _choices() -> int:
    """How many the file holds."""
    return sum(map(len, memory.process_choices.entries().values()))


if __name__ == "__main__":
    sys.exit(main())
