"""What a result depends on: versions, devices, settings; and what the device can do, as PyTorch reaches it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.gpu_check.scale import Scale
from benchmarks.gpu_check.times import milliseconds

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "hypothesis")
SETTINGS = ("TRITON_", "CUDA_", "FUSED_RESIDUAL_", "TORCH_", "PYTORCH_")


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
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


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


def ceilings(scale: Scale) -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and operations per second of a large matrix product."""
    source = torch.empty(scale.copied_bytes, dtype=torch.uint8, device=scale.device).random_()
    target = torch.empty_like(source)
    square = torch.randn(2, scale.matrix, scale.matrix, device=scale.device).to(scale.dtype)
    copy = milliseconds(lambda: target.copy_(source), scale)
    product = milliseconds(lambda: square[0] @ square[1], scale)
    return {
        "bytes_per_second": 2 * source.nbytes / copy[0] * 1e3,
        "operations_per_second": 2 * scale.matrix**3 / product[0] * 1e3,
    }
