"""What `resnet.fuse` gives for a model that people have: `python -m benchmarks.models --help`.

For each: what was fused, the errors of a training step beside eager's, the bytes that it keeps, and the time of
training and inference in interleaved pairs, as in `benchmarks.compare`. Weights, images and labels are random ones; on
all sides the same, and channels_last.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common, turns
from benchmarks.common import Implementation
from benchmarks.verdict import Comparison, busy_note
from resnet import fuse
from resnet.commands import (
    DTYPES,
    check_outputs,
    logits_of,
    made_by,
    maker,
    require,
    require_count,
    standard_stream,
    write_output,
)
from resnet.kernels.host.command import ConfigError, Parser, run
from resnet.kernels.host.files import irregular


@dataclass(frozen=True)
class Errors:
    """Of a training step against float64: of its logits, and of the gradients of all weights.

    Each is a root mean square over that of the exact values.
    """

    logits: float
    gradients: float


@dataclass(frozen=True)
class Result:
    """One model's figures; those that are by implementation have the keys "fused" and "eager"."""

    model: str
    fused: int  # blocks and stems
    left: int  # of those that `fuse` knows
    unknown: int  # modules of other classes that hold a convolution and a BatchNorm
    errors: dict[str, Errors]
    saved_bytes: dict[str, int]
    training: tuple[float, ...]  # fused over eager, pair by pair
    inference: tuple[float, ...]
    waited_for_cpu: float  # the part of the time in which threads waited for a CPU, from 0 to 1; the worst side's


def measure(model: str, shape: tuple[int, int, int], pairs: int, fused: Implementation) -> Result:
    """The figures of the model that `model`, a module:callable, names, with images of `shape` (N, H, W).

    Raises:
        ConfigError: there is no such model, or it cannot be trained on such images.
    """
    eager = dataclasses.replace(fused, kind="eager")
    net = common.seeded(lambda: _drawn(made_by(model))).to(eager.device, memory_format=eager.memory_format)
    N, H, W = shape
    x = common.activations(eager, N, _in_channels(net), H, W)
    try:
        with torch.no_grad():
            logits = logits_of(copy.deepcopy(net).train(), x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"MODEL: expected one that trains on {N} images of {H}x{W}, got {model} ({error})") from error
    labels = common.labels(eager, N, logits.shape[1])
    fused_net = copy.deepcopy(net)
    with fused.scope():
        report = fuse(fused_net)
    sides = {"fused": (fused, fused_net), "eager": (eager, net)}
    calls = []
    for implementation, module in sides.values():
        run = partial(logits_of, copy.deepcopy(module).eval())
        calls.append(turns.Side(common.inference(implementation, run, x), implementation.scope))
    inference = _compared(calls, pairs, fused.device)  # first, in a process that has not trained: its heap is small
    exact = _step(copy.deepcopy(net).double(), x.double(), labels, Implementation("eager", eager.device))
    errors, saved, steps = {}, {}, []
    for kind, (implementation, module) in sides.items():
        run = partial(logits_of, module)
        with implementation.scope():
            step = _step(copy.deepcopy(module), x, labels, implementation)
            errors[kind] = Errors(*map(_distance, step, exact))
            saved[kind] = common.module_saved_bytes(implementation, module, run, x)
            step = common.training_step(implementation, module, run, [(x, labels)])
            steps.append(turns.Side(step, implementation.scope))
    training = _compared(steps, pairs, fused.device)
    return Result(
        model,
        len(report.fused),
        len(report.left),
        sum(report.unknown.values()),
        errors,
        saved,
        training.ratios,
        inference.ratios,
        max(training.waited, inference.waited),
    )


def _drawn(net: nn.Module) -> nn.Module:
    """The net with BatchNorm's weights drawn: a block's last ones often start as zeros, which hide all before them."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def _in_channels(net: nn.Module) -> int:
    """Of the images that the net takes; ConfigError where it has no convolution."""
    channels = next((module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    require(channels is not None, "MODEL", "a net with a convolution", type(net).__name__)
    return channels


def _step(
    net: nn.Module, x: Tensor, labels: Tensor, implementation: Implementation
) -> tuple[list[Tensor], list[Tensor]]:
    """A training step's logits, as a list of one, and the gradients of the parameters that are trained."""
    with implementation.autocast():
        out = logits_of(net.train(), x)
        loss = F.cross_entropy(out, labels)
    return [out.detach()], list(torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad]))


def _distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The root mean square of the differences, over that of the exact values."""
    off = sum((f.double() - e).square().sum() for f, e in zip(found, exact, strict=True))
    return (off / sum(e.square().sum() for e in exact)).sqrt().item()


def _compared(sides: list[turns.Side], pairs: int, device: torch.device) -> Comparison:
    _, (fused, eager) = turns.paired(sides, pairs, device)
    waited = max(fused.waited_share, eager.waited_share)
    return Comparison.of_rounds("eager", fused.seconds, eager.seconds, waited)


HEAD = (
    "| model | fused | left, unknown | logits' error | eager's | gradients' error | eager's | bytes kept | training | "
    "inference |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(result: Result) -> str:
    """The model's line under HEAD, in Markdown."""
    fused, eager = result.errors["fused"], result.errors["eager"]
    kept = result.saved_bytes["fused"] / result.saved_bytes["eager"]
    cells = [result.model, str(result.fused), f"{result.left}, {result.unknown}"]
    cells += [f"{e:.1e}" for e in (fused.logits, eager.logits, fused.gradients, eager.gradients)]
    cells += [f"{kept:.3f}", _figure(result.training), _figure(result.inference)]
    return f"| {' | '.join(cells)} |"


def _figure(ratios: tuple[float, ...]) -> str:
    """The median, and its 95% interval where the pairs are enough for one."""
    comparison = Comparison("eager", ratios)
    interval = comparison.interval
    return f"{comparison.median:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.models", description=common.purpose(__doc__))
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="module:callable, which is called for an nn.Module, such as torchvision.models:resnet50, "
        "timm.models.resnet:resnet18d, transformers:ResNetForImageClassification",
    )
    parser.add_argument("--pairs", type=int, default=15, help="in training and in inference (default: 15)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=96, help="height and width of the images (default: 96)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="other than float32: autocast to it")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every pair and the figures to this file, anew after each model"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    return run(parser, lambda: _measure_all(args))


def _is_stream(path: Path) -> bool:
    """Whether what is written there cannot be replaced by what comes later, as in a pipe."""
    return standard_stream(path) is not None or irregular(path) is not None


def _measure_all(args: argparse.Namespace) -> int:
    for name in ("pairs", "batch_size", "size"):
        require_count(f"--{name.replace('_', '-')}", getattr(args, name))
    check_outputs({"--json": args.json})
    device = common.current_device(args.device)
    fused = Implementation("fused", device, DTYPES[args.dtype])
    if reason := common.unavailable(fused):
        raise ConfigError(reason)
    for model in args.models:
        maker(model)  # an error in the last name is not to come after the minutes of the first
    environment = common.environment(device)
    print(f"{environment['device']}, torch {environment['torch']}, {fused.backend} backend")
    print(f"batch {args.batch_size}, {args.size}x{args.size}, {args.dtype}, {args.pairs} pairs\n\n{HEAD}", flush=True)
    report = {"environment": environment}
    report |= {name: getattr(args, name) for name in ("batch_size", "size", "dtype", "pairs")}
    results = []
    for model in args.models:
        results.append(measure(model, (args.batch_size, args.size, args.size), args.pairs, fused))
        print(row(results[-1]), flush=True)
        interrupted = len(results) < len(args.models)  # for who reads it where the run ends before the next model
        if args.json is not None and not (interrupted and _is_stream(args.json)):
            report |= {"interrupted": interrupted, "results": [dataclasses.asdict(r) for r in results]}
            write_output(args.json, (json.dumps(report, indent=1) + "\n").encode())
    if note := busy_note(max(result.waited_for_cpu for result in results)):
        print(f"\n{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
