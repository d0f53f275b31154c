"""Everything that a GPU has to say, in one folder to attach to a bug report: `make gpu-check`.

    gpu-check/<time>/environment.json      versions, devices, driver, commit
                     tests.log, tests.xml  the whole suite, compiled
                     sanitizer.log         a few of the kernels' tests under compute-sanitizer, where that is installed
                     benchmarks.log, .json the benchmark suite
                     summary.txt           what passed and what did not

Exits with 1 where a step failed, with 2, before doing anything, where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "hypothesis")
# Small, since under compute-sanitizer a kernel takes a hundred times as long.
SANITIZED_TESTS = tuple(
    f"tests/kernels/test_{name}.py"
    for name in (
        *("batch_norm", "batch_norm_max_pool", "conv_forward", "conv_grad_input"),
        *("conv_grad_weight", "conv_grad_weight_max_pool"),
    )
)
SANITIZED_ONLY = "single_row or second_run or same_bits"


@dataclass(frozen=True)
class Step:
    """A command whose output goes to `<name>.log`."""

    name: str
    command: tuple[str, ...]


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, object]]:
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {
            "name": d.name,
            "capability": f"{d.major}.{d.minor}",
            "memory_bytes": d.total_memory,
            "multiprocessors": d.multi_processor_count,
        }
        for d in found
    ]


def environment() -> dict[str, object]:
    """What a result depends on."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "devices": devices(),
        "settings": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("TRITON_", "CUDA_", "FUSED_RESIDUAL_", "TORCH_", "PYTORCH_"))
        },
    }


def steps(folder: Path) -> list[Step]:
    pytest = (sys.executable, "-m", "pytest")
    planned = [Step("tests", (*pytest, "tests", f"--junitxml={folder / 'tests.xml'}"))]
    if shutil.which("compute-sanitizer"):
        check = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")
        planned.append(Step("sanitizer", (*check, *pytest, *SANITIZED_TESTS, "-k", SANITIZED_ONLY)))
    report = f"--benchmark-json={folder / 'benchmarks.json'}"
    planned.append(Step("benchmarks", (*pytest, "benchmarks", "--benchmark-only", report)))
    return planned


def run(step: Step, folder: Path) -> bool:
    """Whether it passed; its output is in the log, its end on the screen."""
    log = folder / f"{step.name}.log"
    print(f"{step.name}: {' '.join(step.command)}", flush=True)
    with log.open("w") as file:
        code = subprocess.run(step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    print(f"{step.name}: {'passed' if code == 0 else f'failed with status {code}'}, see {log}", flush=True)
    return code == 0


def check(folder: Path) -> bool:
    """Runs every step, whether or not the one before it passed."""
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    results = {step.name: run(step, folder) for step in steps(folder)}
    lines = [f"{name}: {'passed' if passed else 'failed'}" for name, passed in results.items()]
    if "sanitizer" not in results:
        lines.append("sanitizer: not run, compute-sanitizer is not on the path")
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nattach this folder to a bug report: {folder}", sep="\n")
    return all(results.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results, which must not exist yet")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch finds no GPU here; without one, `make test` checks what can be", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu-check: TRITON_INTERPRET is set, kernels would not be compiled: unset it", file=sys.stderr)
        return 2
    folder = args.out or ROOT / "gpu-check" / time.strftime("%Y%m%d-%H%M%S")
    if folder.exists():
        print(f"gpu-check: {folder} exists already: name another with --out", file=sys.stderr)
        return 2
    return 0 if check(folder.resolve()) else 1


if __name__ == "__main__":
    sys.exit(main())
