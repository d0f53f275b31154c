"""The report's pictures: what a step takes, its kernels beside the least that they could take, the textbook's curves.

Needs matplotlib; without it there are none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_check.report import NET_CASES, Results

OURS, RIVAL, LEAST = "#0b62a4", "#9aa5b1", "#c75a00"


def write(results: Results, folder: Path) -> None:
    """Write report-*.png, one for each stage that has something to show, and add them to report.md."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    with (folder / "report.md").open("a") as report:
        for name, figure in figures(results):
            figure.savefig(folder / f"report-{name}.png", dpi=120)
            report.write(f"\n![{name}](report-{name}.png)\n")


def figures(results: Results) -> Iterator[tuple[str, object]]:
    """(name, matplotlib's figure)."""
    net = {**results.get("net", {}), **results.get("max-autotune", {})}
    for case in NET_CASES:
        rows = _timed(net, f"{case}, ")
        if rows:
            yield case.split()[-1], _step(case, rows)
    for mode, found in results.get("kernels", {}).items():
        if isinstance(found, dict) and found.get("gaps"):
            yield f"kernels-{mode}", _kernels(mode, found["gaps"])
    curves = {model: run["epochs"] for model, run in results.get("textbook", {}).items() if "epochs" in run}
    if curves:
        from resnet import plots  # here, since it needs matplotlib

        yield "textbook", plots.runs(curves)


def _timed(net: Results, prefix: str) -> dict[str, dict]:
    found = {name.removeprefix(prefix): row for name, row in net.items() if name.startswith(prefix)}
    return {name: row for name, row in found.items() if isinstance(row, dict) and "launched_ms" in row}


def _axes(height: float):
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots()


def _step(case: str, rows: dict[str, dict]):
    """A pair of bars for each way to run the net: as a CUDA graph, and launched by Python."""
    figure, axes = _axes(1 + 0.45 * len(rows))
    for place, (name, row) in enumerate(rows.items()):
        colour = OURS if name.startswith("fused") else RIVAL
        for key, offset, alpha in (("replayed_ms", -0.2, 1.0), ("launched_ms", 0.2, 0.5)):
            if key in row:
                median, low, high = row[key]
                axes.barh(place + offset, median, 0.38, color=colour, alpha=alpha)
                axes.plot([low, high], [place + offset] * 2, color="0.2", linewidth=1)
                axes.annotate(f" {median:.2f}", (max(median, high), place + offset), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds of a step, with the 20% and 80% quantiles; full: as a CUDA graph, pale: launched")
    axes.set_title(case, loc="left")
    return figure


def _kernels(mode: str, gaps: list[dict]):
    """The launches with the largest gaps: how long they took, and the least that the ceilings allow."""
    figure, axes = _axes(1 + 0.4 * len(gaps))
    places = range(len(gaps))
    axes.barh(places, [gap["microseconds"] for gap in gaps], 0.7, color=OURS, label="measured")
    axes.barh(places, [gap["least_microseconds"] for gap in gaps], 0.7, color=LEAST, label="the least, modelled")
    names = [f"{gap['count']} x {gap['kernel']}\n{gap['what'].split(' BLOCK')[0]}" for gap in gaps]
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds of a launch")
    axes.set_title(f"ResNet-18 {mode}: the largest gaps", loc="left")
    axes.legend(frameon=False)
    return figure
