"""What a GPU has to say, in a given number of minutes, in one folder: `make gpu-check`.

    DIR/results.json     everything below, written anew after each figure
        report.md        the same for reading
        choices.json     the ways and tiles that were timed, as FUSED_RESIDUAL_CACHE=DIR gives them to later runs
        textbook-*.json  the textbook's training, whole
        report-*.png     its pictures, where matplotlib is
        tests.log        the kernels' and the modules' tests, compiled

The stages run in this order, each as far as the time goes; what fails is noted, and the next one runs:

    environment  versions, device, and its ceilings: a large copy, a large product
    parity       blocks with every tile that may be chosen, against float64
    net          ResNet-18, training and inference: fused, eager, torch.compile; launched, and as a CUDA graph
    kernels      a fused step kernel by kernel, beside the least that the ceilings allow
    textbook     10 epochs of ResNet-18 on Fashion-MNIST, fused and eager
    blocks       the residual blocks of the net, as `net`
    model        the published ResNet-50, as `net`
    sanitizer    compute-sanitizer over a step of the net, where it is installed
    tests        as many of the tests as there is time for
    max-autotune torch.compile's, which compiles for minutes

Needs a Python with torch and triton, pytest for the tests, pytest-xdist to have them side by side; no make, no pip.
Exits with 1 where something failed, with 2, before doing anything, where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.common import purpose
from benchmarks.gpu_check import environment, launches, parity, plots, processes, report, sanitizer, times
from benchmarks.gpu_check.errors import noted
from benchmarks.gpu_check.scale import Scale, full, rehearsal
from resnet.commands import require, write_output
from resnet.kernels.host import command
from resnet.kernels.host.command import ConfigError, Parser
from resnet.kernels.tuning import memory

ROOT = environment.ROOT
Measurement = tuple[str, Callable[[], object]]


@dataclass
class Check:
    """A run: its folder, its end, and what it has found so far."""

    folder: Path
    scale: Scale
    seconds: float
    results: dict[str, dict] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def stage(self, name: str, least: float, measurements: Iterable[Measurement]) -> None:
        """Runs the measurements while more than `least` seconds are left; each one's result is kept at once."""
        found = self.results.setdefault(name, {})
        start = time.monotonic()
        try:
            for item, measure in measurements:
                if self.left < least:
                    found["not all of it"] = f"less than {least:.0f} s were left"
                    break
                found[item] = _result(measure)
                print(
                    f"[{self.seconds - self.left:6.1f} s] {name}: {item}: {json.dumps(found[item])[:300]}", flush=True
                )
                self.save()
        except Exception as error:  # of what gives the measurements
            found["stage"] = noted(error)
        self.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        self.save()

    def save(self) -> None:
        write_output(self.folder / "results.json", (json.dumps(self.results, indent=1) + "\n").encode())
        write_output(self.folder / "report.md", report.markdown(self.results).encode())


def _result(measure: Callable[[], object]) -> object:
    try:
        return measure()
    except Exception as error:
        return noted(error)


# ---- the stages that are made of more than one file ------------------------------------------------------------


def kernels(check: Check) -> Iterator[Measurement]:
    """Of a training step and of an inference: every kernel, and the largest gaps."""
    row, ceilings = times.ROWS[0], check.results["environment"]["ceilings"]
    for train in (True, False):

        def measure(train: bool = train) -> dict[str, object]:
            with row.scope(check.scale):
                step = times.net_step(row, check.scale, train)
                for _ in range(3):
                    step()
                with launches.recorded() as noted:
                    step()
                rows = launches.table(launches.profiled(step), noted, ceilings)
            return {"rows": rows, "gaps": launches.largest_gaps(rows), "totals": launches.totals(rows)}

        yield "training" if train else "inference", measure


def textbook(check: Check) -> Iterator[Measurement]:
    for impl in ("fused", "eager"):
        target = check.folder / f"textbook-{impl}.json"
        settings = ("--impl", impl, "--dtype", "bfloat16", "--device", check.scale.device.type)
        options = (*settings, "--json", str(target), *check.scale.epochs)

        def measure(options: tuple[str, ...] = options, target: Path = target) -> dict[str, object]:
            done = subprocess.run(
                (sys.executable, "-m", "resnet.train", *options),
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=check.left,
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-400:])
            found = json.loads(target.read_text())
            kept = ("loss", "train_acc", "test_acc", "examples_per_sec", "data", "epochs")
            return {"said": done.stdout.strip().splitlines()} | {name: found[name] for name in kept}

        yield impl, measure


def tests(check: Check) -> Iterator[Measurement]:
    """The kernels' tests and the modules', side by side where pytest-xdist is."""
    folders = ("tests/resnet/test_schema.py",)
    if check.scale.on_gpu:
        folders = ("tests/kernels", "tests/resnet", "tests/commands")
    parallel = ("-n", str(max(1, (os.cpu_count() or 2) - 2))) if importlib.util.find_spec("xdist") else ()
    arguments = (sys.executable, "-m", "pytest", *folders, *parallel, "-q", "--tb=short")

    def measure() -> dict[str, object]:
        variables = os.environ | {"FUSED_RESIDUAL_CACHE": "off"}
        if check.scale.on_gpu:
            variables.pop("TRITON_INTERPRET", None)
        log = check.folder / "tests.log"
        with processes.running(arguments, log, variables) as process:
            code = processes.status(process, check.left - processes.GRACE)
            if code is None:
                processes.interrupt(process)
        return report.ended(code, log)

    yield " ".join(folders), measure


def run(check: Check) -> bool:
    """Every stage; whether nothing failed."""
    try:
        check.folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out: expected a folder that can be made, got {check.folder} ({error.strerror})") from None
    # In place of the user's: this run times anew, and its choices are one of its results.
    memory.process_choices.path = check.folder / "choices.json"
    os.environ["FUSED_RESIDUAL_CACHE"] = str(check.folder)  # for the commands that it starts
    scale = check.scale
    reserve = 0.1 * check.seconds
    check.stage(
        "environment",
        0,
        [
            ("environment", environment.environment),
            ("ceilings", lambda: environment.ceilings(scale)),
        ],
    )
    check.stage("parity", reserve, parity.checks(scale, lambda: check.left - 0.5 * check.seconds))
    check.stage("net", 0.3 * check.seconds, times.net_rows(times.ROWS, scale))
    if scale.on_gpu:
        check.stage("kernels", reserve, kernels(check))
    check.stage("textbook", reserve, textbook(check))
    check.stage("blocks", reserve, times.block_rows(scale))
    check.stage("model", reserve, times.net_rows(times.MODEL_ROWS, scale, scale.model))
    check.stage("sanitizer", reserve, sanitizer.checks(scale, check.folder, min(check.left, 0.2 * check.seconds)))
    check.stage("tests", 0, tests(check))
    check.stage("max-autotune", reserve, times.net_rows(times.SLOW_ROWS, scale))
    plots.write(check.results, check.folder)
    return not list(report.failures(check.results))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.gpu_check", description=purpose(__doc__))
    parser.add_argument("--out", type=Path, help="folder for the results, which must not exist yet")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long it may take (default: 9)")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with small shapes: to see that all of it runs"
    )
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check: PyTorch finds no GPU here; without one, `make test` checks what can be", file=sys.stderr)
        return 2
    if not args.rehearse and os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu-check: TRITON_INTERPRET is set, kernels would not be compiled: unset it", file=sys.stderr)
        return 2
    return command.run(parser, lambda: _check(args))


def _check(args: argparse.Namespace) -> int:
    require(0 < args.minutes < math.inf, "--minutes", "a positive number", args.minutes)
    folder = args.out or ROOT / "gpu-check" / time.strftime("%Y%m%d-%H%M%S")
    require(not os.path.lexists(folder), "--out", "a folder that does not exist yet", folder)
    check = Check(Path(os.path.abspath(folder)), rehearsal() if args.rehearse else full(), 60 * args.minutes)
    passed = run(check)
    print(f"\n{report.summary(check.results)}\nattach this folder to a bug report: {check.folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
