"""Interleaved pairs of fused against eager and torch.compile: `python -m benchmarks.compare --help`.

Both of a pair run right after each other, now one first and now the other, so that what drifts (clock rates, other
processes) touches both alike and drops out of their ratio. Same weights, inputs and memory format (channels_last).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, turns
from benchmarks.common import Implementation
from benchmarks.verdict import CONFIDENCE, Comparison, busy_note
from resnet.commands import DTYPES, check_outputs, check_plot, require, write_output, write_plot
from resnet.data import FASHION_MNIST, IMAGE_SIZE, DatasetError, ImageSet, load
from resnet.kernels.host.command import ConfigError, Parser, ended_by, run, say

RIVALS = ("eager", "compile")
BLOCK_CASES = tuple(f"block{stage}-{mode}" for stage in (1, 2, 3, 4) for mode in ("train", "inference"))
CASES = ("resnet18-train", "resnet18-inference", *BLOCK_CASES)
DEFAULT_CASES = ("resnet18-train", "resnet18-inference", "block1-train", "block1-inference")
CHANNELS = (64, 128, 256, 512)  # of the stages' identity blocks
IMAGE_BATCHES = 4


@dataclass(frozen=True)
class Settings:
    """What to compare, and how. Raises ConfigError for a value out of its range."""

    pairs: int
    batch_size: int
    resize: int  # pixels; the blocks' inputs have the size that images of this size have in their stage
    cases: tuple[str, ...]
    rivals: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype  # other than float32: under autocast

    def __post_init__(self) -> None:
        require(self.pairs >= 1, "--pairs", "at least 1", self.pairs)
        require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        require(self.resize >= IMAGE_SIZE, "--resize", f"at least {IMAGE_SIZE}, the images' own size", self.resize)
        smallest = min((self.stage_size(_stage(case)) for case in self.cases if case.endswith("-train")), default=2)
        if smallest**2 * self.batch_size == 1:
            raise ConfigError(
                f"--batch-size 1 with --resize {self.resize}: a stage has one value per channel, which BatchNorm "
                "cannot normalise in training; expected a batch of 2, or larger images"
            )

    def stage_size(self, stage: int) -> int:
        """Height and width of the activations in stage 1 to 4: the images' size halved, rounded up, 2 to 5 times."""
        return math.ceil(self.resize / 2 ** (stage + 1))

    def implementation(self, kind: str) -> Implementation:
        return Implementation(kind, self.device, self.dtype)


@dataclass(frozen=True)
class Result:
    """Seconds per call of the pairs of one case against one rival."""

    case: str
    rival: str
    calls: int  # per side of a pair
    fused_seconds: tuple[float, ...]
    rival_seconds: tuple[float, ...]
    waited_for_cpu: float  # the part of the time in which threads waited for a CPU, from 0 to 1; the worse side's

    @property
    def comparison(self) -> Comparison:
        return Comparison.of_rounds(
            common.KINDS[self.rival], self.fused_seconds, self.rival_seconds, self.waited_for_cpu
        )

    def to_json(self) -> dict[str, Any]:
        comparison = self.comparison
        low, high = comparison.interval or (None, None)
        return {
            **dataclasses.asdict(self),
            "ratio_median": comparison.median,
            "ratio_min": min(comparison.ratios),
            "ratio_max": max(comparison.ratios),
            "ratio_low": low,
            "ratio_high": high,
            "speedup": 1 / comparison.median,
            "verdict": comparison.verdict,
        }


# ---- measuring ------------------------------------------------------------------------------------------------


def workload(
    case: str, implementation: Implementation, settings: Settings, data: ImageSet | None
) -> Callable[[], None]:
    """The function without arguments that `case` times for `implementation`; `data` is wanted for ResNet-18 only."""
    what, mode = case.split("-")
    if what == "resnet18":
        module, run = common.net(implementation)
        count = IMAGE_BATCHES if mode == "train" else 1
        batches = common.images(implementation, data, settings.batch_size, count, settings.resize)
        if mode == "train":
            return common.training_step(implementation, module, run, batches)
        x = batches[0][0]
    else:
        module, run, x = _block(implementation, _stage(case), settings)
        if mode == "train":
            module.train()
            return common.forward_backward(implementation, run, x, module.parameters())
    module.eval()
    return common.inference(implementation, run, x)


def _block(implementation: Implementation, stage: int, settings: Settings):
    channels, size = CHANNELS[stage - 1], settings.stage_size(stage)
    module, run = common.residual(implementation, channels, channels, stride=1)
    return module, run, common.activations(implementation, settings.batch_size, channels, size, size)


def _stage(case: str) -> int:
    """The stage of a block's case; for the whole net the last, whose activations are the smallest."""
    return int(case[len("block")]) if case.startswith("block") else len(CHANNELS)


def measure(case: str, rival: str, settings: Settings, data: ImageSet | None) -> Result:
    """Times `settings.pairs` pairs, after a warm-up that compiles, and chooses how often each side is called."""
    sides = []
    for implementation in (settings.implementation("fused"), settings.implementation(rival)):
        with implementation.scope():
            sides.append(turns.Side(workload(case, implementation, settings, data), implementation.scope))
    calls, (fused, other) = turns.paired(sides, settings.pairs, settings.device)
    waited = max(fused.waited_share, other.waited_share)
    return Result(case, rival, calls, tuple(fused.seconds), tuple(other.seconds), waited)


def saved_bytes(settings: Settings, data: ImageSet) -> dict[str, dict[str, int]]:
    """Bytes saved for backward, for each stage's identity block, without its input, and for the whole net."""
    result: dict[str, dict[str, int]] = {}
    for kind in ("fused", "eager"):
        implementation = settings.implementation(kind)
        with implementation.scope():
            for stage in range(1, len(CHANNELS) + 1):
                if settings.stage_size(stage) ** 2 * settings.batch_size > 1:
                    module, run, x = _block(implementation, stage, settings)
                    saved = common.block_saved_bytes(implementation, module, run, x)
                    result.setdefault(f"block{stage}", {})[kind] = saved
            if settings.stage_size(len(CHANNELS)) ** 2 * settings.batch_size > 1:
                module, run = common.net(implementation)
                x, _ = common.images(implementation, data, settings.batch_size, 1, settings.resize)[0]
                saved = common.module_saved_bytes(implementation, module, run, x)
                result.setdefault("resnet18", {})[kind] = saved
    return result


# ---- reporting ------------------------------------------------------------------------------------------------


def case_label(case: str) -> str:
    """Such as "stage 1 block, training" for block1-train."""
    what, mode = case.split("-")
    what = "ResNet-18" if what == "resnet18" else f"stage {_stage(case)} block"
    return f"{what}, {'training' if mode == 'train' else mode}"


def results_table(results: list[Result]) -> str:
    head = (
        f"{'case':<19} {'rival':<13} {'fused ms':>9} {'rival ms':>9}   {'fused/rival':>11} {'min':>6} {'max':>6}   "
        f"{'verdict':<18}  {CONFIDENCE:.0%} interval"
    )
    lines = [head]
    for result in results:
        fused, rival = (1e3 * statistics.median(s) for s in (result.fused_seconds, result.rival_seconds))
        pairs = result.comparison
        line = (
            f"{result.case:<19} {pairs.rival:<13} {fused:>9.2f} {rival:>9.2f}   {pairs.median:>11.3f} "
            f"{min(pairs.ratios):>6.3f} {max(pairs.ratios):>6.3f}   {pairs.verdict:<18}  {pairs.spread}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def saved_table(saved: dict[str, dict[str, int]]) -> str:
    lines = [f"{'saved for backward':<19} {'fused':>14} {'eager':>14}   {'fused/eager':>11}"]
    for what, size in saved.items():
        fused, eager = size["fused"], size["eager"]
        lines.append(f"{what:<19} {fused:>12,} B {eager:>12,} B   {fused / eager:>11.3f}")
    return "\n".join(lines)


# ---- the command ----------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.compare", description=common.purpose(__doc__))
    parser.add_argument("--pairs", type=int, default=15, help="pairs per case and rival (default: 15)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--resize", type=int, default=96, help="pixels of the images (default: 96)")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=DEFAULT_CASES,
        metavar="CASE",
        help=f"of {', '.join(CASES)}; default: {' '.join(DEFAULT_CASES)}. blockN: the identity block of stage N",
    )
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, metavar="RIVAL", help="of eager, compile; default: both")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="other than float32: autocast to it")
    parser.add_argument("--data", help="folder of Fashion-MNIST; without: see resnet.data.load")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every pair and the figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios; needs matplotlib")
    return parser


def _usable_rivals(asked: list[str] | None, device: torch.device) -> tuple[str, ...]:
    reason = common.compile_unavailable(device.type) if asked is None or "compile" in asked else None
    if reason and asked is not None:
        raise ConfigError(f"--rivals compile: {reason}")
    if reason:
        print(f"rival compile skipped: {reason}", file=sys.stderr)
        return ("eager",)
    return tuple(dict.fromkeys(asked or RIVALS))


def _prepare(args: argparse.Namespace) -> tuple[Settings, ImageSet]:
    device = common.current_device(args.device)
    check_plot(args.plot)
    check_outputs({"--json": args.json, "--plot": args.plot})
    settings = Settings(
        args.pairs,
        args.batch_size,
        args.resize,
        tuple(dict.fromkeys(args.cases)),
        RIVALS,
        device,
        DTYPES[args.dtype],
    )
    if reason := common.unavailable(settings.implementation("fused")):
        raise ConfigError(reason)
    data = load(args.data)
    require(data.spec == FASHION_MNIST, "--data", "a folder of Fashion-MNIST's four IDX files", args.data)
    n = len(data.train_images)
    require(settings.batch_size <= n, "--batch-size", f"at most {n}, the images there are", settings.batch_size)
    return dataclasses.replace(settings, rivals=_usable_rivals(args.rivals, device)), data


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    return run(parser, lambda: _compare(args), (DatasetError,))


def _compare(args: argparse.Namespace) -> int:
    settings, data = _prepare(args)
    fused = settings.implementation("fused")
    environment = common.environment(settings.device)
    title = (
        f"batch {settings.batch_size}, images {settings.resize}x{settings.resize}, {args.dtype}\n"
        f"{environment['device']}, torch {environment['torch']}, {fused.backend} backend"
    )
    print(title)
    print(f"Fashion-MNIST: {data.source}; {settings.pairs} pairs each", flush=True)

    results: list[Result] = []
    saved: dict[str, dict[str, int]] = {}
    status = 0
    try:
        saved = saved_bytes(settings, data)
        for case in settings.cases:
            for rival in settings.rivals:
                print(f"measuring {case} against {rival}", file=sys.stderr, flush=True)
                results.append(measure(case, rival, settings, data))
    except KeyboardInterrupt as error:
        status = ended_by(error)
        say("stopped: what follows is what was measured in full")

    print(f"\n{results_table(results)}\n\n{saved_table(saved)}")
    if note := busy_note(max((result.waited_for_cpu for result in results), default=0.0)):
        print(f"\n{note}")
    try:
        if args.json is not None:
            report = {
                "environment": environment,
                "backend": fused.backend,
                "data": data.source,
                "batch_size": settings.batch_size,
                "resize": settings.resize,
                "dtype": args.dtype,
                "pairs": settings.pairs,
                "interrupted": bool(status),
                "results": [result.to_json() for result in results],
                "saved_bytes": saved,
            }
            write_output(args.json, (json.dumps(report, indent=1) + "\n").encode())
            print(f"\nwritten: {args.json}")
    finally:
        if args.plot is not None and results:
            from benchmarks import plot  # here, since it needs matplotlib, which the rest does without

            labelled = [(case_label(result.case), result.comparison) for result in results]
            write_plot(args.plot, plot.figure(labelled, title))
            print(f"\nwritten: {args.plot}")
    return status


if __name__ == "__main__":
    sys.exit(main())
