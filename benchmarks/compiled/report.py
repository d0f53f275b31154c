"""What every kernel asks of a GPU, without a GPU: registers, spills, shared memory, access widths, tensor cores.

    python -m benchmarks.compiled.report          a share of all specialisations, with every kernel, argument
                                                  specialisation and tile in it
    python -m benchmarks.compiled.report --all    all of them
    python -m benchmarks.compiled.report --all --cases 'resnet18 float16'
    python -m benchmarks.compiled.report --json new.json --compare old.json

Real calls of the library are recorded on each device (see `launches`), compiled in parallel and judged by `limits`. The
exit status is 1 where a limit is broken, or a kernel of the package was not reached.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from heapq import heapify, heappop, heapreplace
from pathlib import Path

import torch
import triton

from benchmarks.compiled import binaries, limits
from benchmarks.compiled.binaries import Figures
from benchmarks.compiled.launches import RecordedLaunch, jit_functions, not_reached, record, unite
from resnet import kernels
from resnet.commands import check_outputs, require, write_output
from resnet.kernels import tuning
from resnet.kernels.host.command import ConfigError, Parser, run
from resnet.kernels.host.files import cache_folder
from resnet.kernels.tuning import DEVICES, devices
from resnet.torch_backend.convolution import out_size

# ---- real calls --------------------------------------------------------------------------------------------------

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DTYPES = (*SIXTEEN_BIT, torch.float32, torch.float64)
CHANNELS = (1, 3, 6, 64, 100)
# The devices that every change is judged on. sm_86, sm_89 and sm_120 run the instructions of sm_80 in less memory.
JUDGED = ("sm_80", "sm_90", "sm_100", "gfx942")


@contextmanager
def _products_skipped() -> Iterator[None]:
    """Inside, PyTorch's convolutions and matrix products on the CPU give uninitialised memory: only launches matter."""
    library = torch.library.Library("aten", "IMPL")

    def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        size = [out_size(*axis) for axis in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)]
        return torch.empty((x.shape[0], weight.shape[0], *size), dtype=x.dtype, memory_format=torch.channels_last)

    def convolution_backward(dy, x, weight, bias_sizes, *settings):
        like = lambda t: torch.empty_like(t, memory_format=torch.channels_last)  # noqa: E731
        needs = settings[-1]
        bias = dy.new_empty(weight.shape[0]) if needs[2] else None
        return like(x) if needs[0] else None, like(weight) if needs[1] else None, bias

    library.impl("convolution", convolution, "CPU")
    library.impl("convolution_backward", convolution_backward, "CPU")
    with warnings.catch_warnings():  # PyTorch warns that a kernel is overridden, which is meant here
        warnings.simplefilter("ignore")
        library.impl("mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "CPU", allow_override=True)
        library.impl("addmm", lambda c, a, b, **_: a.new_empty(a.shape[0], b.shape[1]), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _step(module: torch.nn.Module, *shape: int, dtype: torch.dtype, needs_x: bool = True) -> None:
    """Forward and backward in training, with frozen statistics and with norms of constants, then inference."""
    x = torch.empty(shape, dtype=dtype, requires_grad=needs_x)
    for training in (True, False):
        module.train(training)(x).sum().backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    module(x).sum().backward()
    with torch.no_grad():
        module(x)


def _resnet18(dtype: torch.dtype, autocast: bool) -> None:
    from resnet import FusedResidual, resnet18

    stored = torch.float32 if autocast else dtype
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        _step(resnet18(10, 1, block=FusedResidual).to(stored), 256, 1, 96, 96, dtype=stored, needs_x=False)


def _resnet50(dtype: torch.dtype) -> None:
    """Its blocks, as the first stages have them, a basic one whose shortcut has a norm; those of nets derived from it.

    ResNet-D's blocks and stem, a dilated one, a ResNeXt's, and those of an SE-ResNet.
    """
    from resnet import FusedBasicBlock, FusedBottleneck, FusedSequential, ResNet, fuse

    deep = ResNet(FusedBasicBlock, depths=(1,), widths=(64,), num_classes=10, stem="deep")
    fuse(deep)
    _step(deep.to(dtype), 32, 3, 224, 224, dtype=dtype, needs_x=False)
    for block, C in (
        (FusedBottleneck(256, 128, 2, avg_down=True), 256),
        (FusedBasicBlock(64, 128, 2, avg_down=True), 64),
        (FusedSequential(FusedBottleneck(64, 64), FusedBottleneck(256, 64), FusedBottleneck(256, 64)), 64),
        (FusedBottleneck(256, 64, dilation=2), 256),
        (FusedBottleneck(256, 128, 2, groups=32), 256),
        (FusedBottleneck(256, 64, squeeze_excite=True), 256),
        (FusedBasicBlock(64, 64, squeeze_excite=True), 64),
        (FusedSequential(FusedBottleneck(256, 64), FusedBottleneck(256, 128, 2)), 256),
        (FusedSequential(FusedBasicBlock(64, 128, 2), FusedBasicBlock(128, 128), FusedBasicBlock(128, 256, 2)), 64),
    ):
        _step(block.to(dtype), 32, C, 56, 56, dtype=dtype)


def _odd_shapes(dtype: torch.dtype) -> None:
    import resnet
    from resnet import (
        FusedBasicBlock,
        FusedBottleneck,
        FusedResidual,
        FusedResidualBottleneck,
        FusedSequential,
        FusedStem,
    )
    from resnet.functional import batch_norm_add_relu

    for C in CHANNELS:
        for size in ((8, C, 24, 24), (2, C, 7, 5)):
            chain = FusedSequential(FusedResidual(C, C), FusedResidual(C, C), FusedResidual(C, 2 * C, True, 2))
            _step(chain.to(dtype), *size, dtype=dtype)
            _step(FusedResidual(C, 2 * C, True, 2).to(dtype), *size, dtype=dtype)
            for needs_x in (True, False):
                _step(FusedStem(C, C).to(dtype), *size, dtype=dtype, needs_x=needs_x)
            for relu in (True, False):
                x, shortcut = (torch.empty(size, dtype=dtype, requires_grad=True) for _ in range(2))
                batch_norm_add_relu(x, None, None, training=True, relu=relu).sum().backward()
                batch_norm_add_relu(x, None, None, shortcut=shortcut, training=True, relu=relu).sum().backward()
    for C in (3, 100):
        for block in (
            FusedSequential(FusedBasicBlock(C, 2 * C, 2), FusedBasicBlock(2 * C, 2 * C), FusedBasicBlock(2 * C, C, 2)),
            FusedSequential(FusedBasicBlock(C, 2 * C, 2), FusedBasicBlock(2 * C, C, 2)),
            FusedBasicBlock(C, 2 * C, 2, avg_down=True),
            FusedResidualBottleneck(C, 4 * C, True, 2),
            FusedSequential(FusedBottleneck(C, C, dilation=3), FusedBottleneck(4 * C, C, 2)),
            FusedBasicBlock(C, C, squeeze_excite=True),
        ):
            _step(block.to(dtype), 2, C, 7, 5, dtype=dtype)
    for variant in ("epilogue", "pytorch"):
        with resnet.convolution(variant):
            for block in (FusedResidual(64, 64), FusedResidual(64, 128, True, 2)):
                _step(block.to(dtype), 8, 64, 24, 24, dtype=dtype)


def _in_tf32(calls: Callable[[], None]) -> None:
    """The calls, with float32 as TensorFloat-32 where the device is NVIDIA's, as on a GPU with PyTorch's switch on."""
    from triton.runtime import driver

    from resnet.triton_backend import convolution

    has_tf32 = driver.active.get_current_target().backend == "cuda"
    original, convolution.tf32 = convolution.tf32, lambda x: has_tf32 and x.dtype == torch.float32
    try:
        calls()
    finally:
        convolution.tf32 = original


CASES: dict[str, Callable[[], None]] = {
    **{f"resnet18 {str(d)[6:]}": lambda d=d: _resnet18(d, False) for d in DTYPES},
    "resnet18 tf32": lambda: _in_tf32(lambda: _resnet18(torch.float32, False)),
    **{f"resnet18 autocast {str(d)[6:]}": lambda d=d: _resnet18(d, True) for d in SIXTEEN_BIT},
    **{f"resnet50 {str(d)[6:]}": lambda d=d: _resnet50(d) for d in SIXTEEN_BIT},
    **{f"odd shapes {str(d)[6:]}": lambda d=d: _odd_shapes(d) for d in DTYPES},
    "odd shapes tf32": lambda: _in_tf32(lambda: _odd_shapes(torch.float32)),
}


def recorded(device: str, cases: Sequence[str] = tuple(CASES)) -> list[RecordedLaunch]:
    """The specialisations that real calls would compile on a device of `tuning.DEVICES`."""
    import resnet

    found: list[RecordedLaunch] = []
    torch.set_num_threads(1)
    recording = record(DEVICES[device].target, DEVICES[device].properties)
    every = tuning.every_candidate(DEVICES[device])
    with recording as launches, every, _products_skipped(), resnet.backend("triton"):
        for case in cases:
            launches.clear()
            CASES[case]()
            mine = unite(launches)
            for launch in mine:
                launch.cases.append(case)
            found = unite(found + mine)
    return found


def _held(launch: RecordedLaunch) -> int:
    """What a program has to hold beside its tile, roughly: tensors, and masks of ragged rows and channels."""
    ragged = sum(not t.aligned for t in launch.tensors.values())
    return len(launch.tensors) + ragged + ("WHOLE=False" in launch.features)


def share(launches: Mapping[str, Sequence[RecordedLaunch]]) -> list[tuple[RecordedLaunch, str]]:
    """Some of each device's launches, (launch, device), chosen so that for each kernel they have

    - every feature, every set of tensors, and every tile for each element size, on one of the devices at least;
    - every element size on each device;
    - every tile of a GEMM on each device, since it is more than its parts: rows times columns are its accumulators.

    Where several launches would add as much of this, the one that holds most is taken: it is the first to run out of
    registers.
    """
    by_kernel = defaultdict(list)
    for device, mine in launches.items():
        for launch in mine:
            size = f"{launch.itemsize} bytes"
            tile = f"{launch.tile} of {size}"
            covers = {*launch.features, " ".join(launch.tensors), tile, f"{size} on {device}"}
            if "BLOCK_K" in launch.signature:
                covers.add(f"{tile} on {device}")
            by_kernel[launch.module, launch.kernel].append((launch, device, covers))
    chosen, draw = [], random.Random(0)
    for some in by_kernel.values():
        wanted = set().union(*(covers for *_, covers in some))
        queue = [(-len(covers), (-_held(launch), draw.random()), at) for at, (launch, _, covers) in enumerate(some)]
        heapify(queue)
        while wanted:  # take the launch that covers most; the queue has what it covered when it was last looked at
            most, rank, at = queue[0]
            launch, device, covers = some[at]
            if len(covers & wanted) < -most:
                heapreplace(queue, (-len(covers & wanted), rank, at))
            else:
                heappop(queue)
                chosen.append((launch, device))
                wanted -= covers
    return chosen


# ---- compiled, in parallel and once ------------------------------------------------------------------------------


@dataclass
class CompiledLaunch:
    device: str
    launch: RecordedLaunch
    figures: Figures

    @property
    def problems(self) -> list[tuple[str, str]]:
        return list(limits.problems(DEVICES[self.device], self.launch, self.figures))

    @property
    def name(self) -> str:
        return f"{self.launch.kernel} on {self.device}: {self.launch.specialisation}"

    def as_json(self) -> dict[str, object]:
        return {
            "kernel": f"{self.launch.module}.{self.launch.kernel}",
            "device": self.device,
            "specialisation": self.launch.specialisation,
            "cases": self.launch.cases,
            "figures": asdict(self.figures),
            "problems": self.problems,
        }


def _cache_key(launch: RecordedLaunch, device: str) -> str:
    sources = [Path(module.__file__).read_text() for module in (binaries, limits, devices)]
    parts = (triton.__version__, device, launch.module, launch.function().cache_key, launch.specialisation, *sources)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@contextmanager
def _workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are gone at the end, without what they were asked for where that is an exception."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


_BATCH = 16  # jobs that a process is given at once


def compiled(jobs: Sequence[tuple[RecordedLaunch, str]], processes: int) -> list[CompiledLaunch]:
    """Each (launch, device) with its figures. Those that an earlier run kept are not worked out again."""
    cache = cache_folder()
    folder = cache and cache / "report"
    paths = [folder and folder / f"{_cache_key(launch, device)}.json" for launch, device in jobs]
    figures: list[Figures | None] = [
        Figures(**json.loads(path.read_text())) if path and path.exists() else None for path in paths
    ]
    missing = [i for i, known in enumerate(figures) if known is None]
    if missing:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        with _workers(processes) as pool:
            batches = [missing[i : i + _BATCH] for i in range(0, len(missing), _BATCH)]
            running = {pool.submit(binaries.read, [jobs[i] for i in some]): some for some in batches}
            for future in as_completed(running):
                for i, result in zip(running[future], future.result(), strict=True):
                    figures[i] = result
                    if paths[i] and not result.error:
                        paths[i].write_text(json.dumps(asdict(result)))
    return [CompiledLaunch(device, launch, f) for (launch, device), f in zip(jobs, figures, strict=True)]


def report(
    devices: Sequence[str] = JUDGED,
    cases: Sequence[str] = tuple(CASES),
    pattern: str = "*",
    everything: bool = False,
    processes: int = 2,
) -> tuple[list[CompiledLaunch], list[str]]:
    """(launches of the kernels that fit the pattern, `@triton.jit` functions of the package that no call reached)."""
    with _workers(processes) as pool:
        launches = dict(zip(devices, pool.map(recorded, devices, [cases] * len(devices))))
    wanted = {d: [launch for launch in mine if fnmatch(launch.kernel, pattern)] for d, mine in launches.items()}
    jobs = [(launch, d) for d, mine in wanted.items() for launch in mine] if everything else share(wanted)
    return compiled(jobs, processes), not_reached(kernels, [launch for mine in launches.values() for launch in mine])


# ---- shown -------------------------------------------------------------------------------------------------------


def _cells(
    rows: Sequence[CompiledLaunch], devices: Sequence[str], value: Callable[[list[CompiledLaunch]], object]
) -> str:
    """A figure on each device, or one figure where it is the same on all."""
    values = [str(value([row for row in rows if row.device == device])) for device in devices]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _narrowest(rows: Sequence[CompiledLaunch]) -> object:
    widths = [
        min(found[name])
        for row in rows
        for name in limits.bulk_tensors(row.launch, DEVICES[row.device])
        for found in (row.figures.loads, row.figures.stores)
        if name in found
    ]
    return min(widths, default="-")


# Columns of the table of instructions: the classes of `binaries` that each one sums.
SHARES = {
    "tensor": ("tensor",),
    "global": ("global", "atomic", "local"),
    "shared": ("shared", "barrier"),
    "float": ("float", "convert"),
    "integer": ("integer", "branch"),
}


def _mix(rows: Sequence[CompiledLaunch]) -> str:
    """Percentages of SHARES in the specialisation with the most instructions."""
    if not rows:
        return "-"
    longest = max((row.figures for row in rows), key=lambda figures: figures.instructions)
    counts = [sum(longest.mix.get(name, 0) for name in classes) for classes in SHARES.values()]
    return "/".join(f"{100 * count / max(1, longest.instructions):.0f}" for count in counts)


def table(rows: Sequence[CompiledLaunch]) -> str:
    """Markdown: a line for each kernel with the worst of its specialisations on each device, then its instructions."""
    devices = [device for device in DEVICES if any(row.device == device for row in rows)]
    columns: dict[str, Callable[[list[CompiledLaunch]], object]] = {
        "compiled": len,
        "registers": lambda some: max((row.figures.registers for row in some), default="-"),
        "spills": lambda some: max((row.figures.spills for row in some), default="-"),
        "shared, bytes": lambda some: max((row.figures.shared for row in some), default="-"),
        "occupancy, %": lambda some: min((round(100 * row.figures.occupancy) for row in some), default="-"),
        "narrowest bulk access, bytes": _narrowest,
        "tensor cores": lambda some: ", ".join(sorted({_name(op) for row in some for op in row.figures.tensor})) or "-",
        "barriers": lambda some: max((row.figures.barriers for row in some), default="-"),
        "instructions": lambda some: max((row.figures.instructions for row in some), default="-"),
    }
    by_kernel = defaultdict(list)
    for row in rows:
        by_kernel[row.launch.kernel].append(row)
    lines = [f"Each figure: {' / '.join(devices)}, the worst of the compiled specialisations.", ""]
    lines += [f"| kernel | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for kernel, some in by_kernel.items():
        lines.append(f"| {kernel} | {' | '.join(_cells(some, devices, value) for value in columns.values())} |")
    lines += ["", f"Instructions, % {' / '.join(SHARES)}, of the specialisation that has most:", ""]
    lines += [f"| kernel | {' | '.join(devices)} |", "| --- " * (len(devices) + 1) + "|"]
    for kernel, some in by_kernel.items():
        cells = [_mix([row for row in some if row.device == device]) for device in devices]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(opcode: str) -> str:
    """The opcode, but one name for AMD's matrix instructions of all shapes and types."""
    return "MFMA" if opcode.startswith("v_") else opcode


def compare(old: Sequence[dict], new: Sequence[dict]) -> Iterator[str]:
    """A line for each specialisation of both reports that changed, then how many are in only one of them."""
    key = lambda row: (row["kernel"], row["device"], row["specialisation"])  # noqa: E731
    before, after = {key(row): row["figures"] for row in old}, {key(row): row["figures"] for row in new}
    for shared in before.keys() & after.keys():
        a, b = before[shared], after[shared]
        changed = [f"{name} {a[name]} -> {b[name]}" for name in b if a.get(name) != b[name]]
        if changed:
            yield f"{shared[0]} on {shared[1]}, {shared[2]}: {'; '.join(changed)}"
    yield f"{len(after.keys() - before.keys())} specialisations are new, {len(before.keys() - after.keys())} are gone"


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.compiled.report", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every specialisation, not a share that has each feature")
    parser.add_argument("--cases", default="*", help=f"pattern of the calls to record: {', '.join(CASES)}")
    parser.add_argument("--kernels", default="*", help="pattern of the kernels to compile")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(JUDGED))
    parser.add_argument("--json", type=Path, metavar="NEW", help="file to write all figures to")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="file that --json wrote before: print what changed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser


def _prepare(options: argparse.Namespace) -> tuple[list[str], list[dict] | None]:
    """The names of the cases, and the figures to compare with. ConfigError for what cannot be used."""
    require(not triton.knobs.runtime.interpret, "TRITON_INTERPRET", "it unset, since kernels are compiled", "it set")
    require(options.processes >= 1, "--processes", "at least 1", options.processes)
    cases = [case for case in CASES if fnmatch(case, options.cases)]
    require(bool(cases), "--cases", f"a pattern that fits one of {', '.join(CASES)}", repr(options.cases))
    names = (function.fn.__name__ for function in jit_functions(kernels).values())
    fits = options.kernels == "*" or any(fnmatch(name, options.kernels) for name in names)
    require(fits, "--kernels", "a pattern that fits a kernel, such as conv_*", repr(options.kernels))
    check_outputs({"--json": options.json})
    if options.compare is None:
        return cases, None
    try:
        return cases, _written(options.compare)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--compare: expected a file that --json wrote, got {options.compare}: {error}") from None


def _written(path: Path) -> list[dict]:
    """What --json wrote to a file; ValueError for another content."""
    rows = json.loads(path.read_text())
    keys = {"kernel", "device", "specialisation", "figures"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        raise ValueError("not a list of figures")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    return run(parser, lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    cases, old = _prepare(options)
    rows, unreached = report(options.devices, cases, options.kernels, options.all, options.processes)
    print(table(rows))
    new = [row.as_json() for row in rows]
    if options.json:
        write_output(options.json, json.dumps(new, indent=1, default=str).encode())
    if old is not None:
        print("", *compare(old, new), sep="\n")
    failed = [f"{row.name}: {kind}: {text}" for row in rows for kind, text in row.problems]
    if len(cases) == len(CASES):
        failed += [f"{name}: no recorded call reaches it" for name in unreached]
    print("", *failed, f"{len(rows)} compiled, {len(failed)} problems", sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
