"""How fused has stood to eager from check to check: `python -m benchmarks.history --help`.

It reads what `make gpu-check` found and `benchmarks.gpu_check.publish` kept in results/. A series is of one device.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import purpose
from benchmarks.gpu_check.publish import KEPT
from benchmarks.gpu_check.report import NET_CASES, Results
from resnet.commands import check_outputs, check_plot, write_plot
from resnet.kernels.host.command import ConfigError, Parser, put, run

if TYPE_CHECKING:  # which the table does without
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MS, RATE = "ms", "examples/sec"
WAYS = {"replayed_ms": "as a CUDA graph", "launched_ms": "launched by Python"}
MARKERS = "osD^vP*X"  # of devices


@dataclass(frozen=True)
class Point:
    """What one check measured of fused and of eager."""

    time: str  # as ISO 8601 writes it
    commit: str
    device: str
    what: str
    unit: str  # MS of a step, or RATE
    fused: float
    eager: float

    @property
    def ratio(self) -> float:
        """Time of fused / time of eager: below 1 where fused is faster."""
        return self.fused / self.eager if self.unit == MS else self.eager / self.fused

    @property
    def check(self) -> str:
        return f"{self.time[:10]}\n{self.commit}"


def points(results: Results) -> Iterator[Point]:
    """What a check's results say of both; a stage that it did not reach has none."""
    known = results["environment"]["environment"]
    where = (known["time"], known["commit"], known["devices"][0]["name"])
    net, textbook = results.get("net", {}), results.get("textbook", {})
    for case in NET_CASES:
        fused, eager = (net.get(f"{case}, {model}", {}) for model in ("fused", "eager"))
        for key, way in WAYS.items():
            if key in fused and key in eager:
                yield Point(*where, f"{case}, {way}", MS, fused[key][0], eager[key][0])
    rates = [textbook.get(model, {}).get("examples_per_sec") for model in ("fused", "eager")]
    if all(rates):
        yield Point(*where, "the textbook's training", RATE, *rates)


def read(paths: Iterable[Path]) -> list[Point]:
    """The points of results' files, the oldest first. ConfigError for a file that is none."""
    found = []
    for path in paths:
        try:
            found += points(json.loads(path.read_bytes()))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise ConfigError(f"{path}: expected results of benchmarks.gpu_check") from None
    return sorted(found, key=lambda point: point.time)


def table(found: Sequence[Point]) -> str:
    """A line per point, by what was measured, then by time."""
    head = ("date", "commit", "device", "measured", "fused", "eager", "", "fused/eager")
    rows = [
        (p.time[:10], p.commit, p.device, p.what, f"{p.fused:.2f}", f"{p.eager:.2f}", p.unit, f"{p.ratio:.3f}")
        for what in dict.fromkeys(p.what for p in found)
        for p in found
        if p.what == what
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    aligned = "<<<<>><>"
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths)) for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def figure(found: Sequence[Point]) -> Figure:
    """The ratio by check above, examples/sec below; colours are of what was measured, markers of devices."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    checks = list(dict.fromkeys(point.check for point in found))
    rates = [point for point in found if point.unit == RATE]
    result = Figure(figsize=(11, 8 if rates else 5), layout="constrained")
    above, *below = result.subplots(2 if rates else 1, squeeze=False)[:, 0]
    above.axhline(1, color="0.4", linewidth=1)
    above.set(ylabel="time of fused / time of eager")
    _draw(above, found, checks, "ratio")
    for axes in below:
        axes.set(ylabel=RATE)
        _draw(axes, rates, checks, "fused", of="fused, ")
        _draw(axes, rates, checks, "eager", of="eager, ", colour=1)
    for axes in (above, *below):
        axes.set_xticks(range(len(checks)), checks)
        axes.set_xlim(-0.5, len(checks) - 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.4)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return result


def _draw(axes: Axes, found: Sequence[Point], checks: Sequence[str], name: str, of: str = "", colour: int = 0) -> None:
    """A line for each of what was measured on each device; `colour` is the first one's place in the cycle."""
    devices = list(dict.fromkeys(point.device for point in found))
    for number, what in enumerate(dict.fromkeys(point.what for point in found)):
        for device, marker in zip(devices, itertools.cycle(MARKERS)):
            series = [point for point in found if (point.what, point.device) == (what, device)]
            if series:
                places = [checks.index(point.check) for point in series]
                values = [getattr(point, name) for point in series]
                axes.plot(places, values, f"C{number + colour}", marker=marker, label=f"{of}{what}, {device}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.history", description=purpose(__doc__))
    parser.add_argument("results", metavar="FILE", type=Path, nargs="*", help="results.json (default: results/*.json)")
    parser.add_argument("--out", metavar="PATH", help="the ratios, and examples/sec, drawn over the checks")
    args = parser.parse_args(argv)
    return run(parser, lambda: _history(args.results or sorted(KEPT.glob("*.json")), args.out))


def _history(paths: Sequence[Path], out: str | None) -> int:
    check_plot(out, "--out")
    check_outputs({"--out": out})
    found = read(paths)
    if not found:
        raise ConfigError(f"no times of fused and of eager in {', '.join(map(str, paths)) or KEPT}")
    put(table(found))
    if out is not None:
        write_plot(out, figure(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
