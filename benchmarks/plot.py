"""The picture of `benchmarks.compare`: ratios of pairs, grouped by case, with what they say. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would look for a screen
from matplotlib.lines import Line2D

from benchmarks.verdict import CONFIDENCE, Comparison

COLOURS = ("#0b62a4", "#c75a00", "#6a3d9a")  # of rivals; told apart in every common colour blindness
FASTER, SLOWER = "#e2f2e5", "#f8e6e3"  # the two sides
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.4, 2, 3, 4, 5, 10, 20, 50, 100)
CLOSE_TICKS = tuple(n / 20 for n in range(10, 31))  # where the axis' ends are less than a factor of 1.6 apart
DOT, MEDIAN, BEYOND_LOW, BEYOND_HIGH = "o", "D", "<", ">"


def figure(comparisons: Sequence[tuple[str, Comparison]], title: str) -> Figure:
    """A group of lines per case, one per rival: a dot per pair, the median with its interval, the verdict.

    Of (case, comparison) pairs; a case's follow each other.
    The axis is logarithmic: twice as fast and half as fast are equally far from 1. A pair beyond the axis is an
    arrowhead at its end.
    """
    cases = list(dict.fromkeys(case for case, _ in comparisons))
    rivals = list(dict.fromkeys(comparison.rival for _, comparison in comparisons))
    result = Figure(figsize=(9, 1.6 + len(cases) * (0.15 + 0.33 * len(rivals))), layout="constrained")
    axes = result.subplots()
    limits = _limits([comparison for _, comparison in comparisons])
    _draw_sides(axes, limits, len(cases))
    spacing = 0.8 / len(rivals)
    for case, comparison in comparisons:
        rival = rivals.index(comparison.rival)
        y = cases.index(case) + (rival - (len(rivals) - 1) / 2) * spacing
        _draw_comparison(axes, comparison, y, limits, COLOURS[rival])
    axes.set_yticks(range(len(cases)), [case.replace(", ", ",\n") for case in cases])
    axes.set_xlabel("time of fused / time of the rival, in one pair")
    result.suptitle(title, fontsize=9, color="0.35")
    result.legend(handles=_legend(rivals), loc="outside lower center", ncols=len(rivals) + 1, frameon=False)
    return result


def _limits(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """The axis' ends: all intervals and medians are inside with room to spare, and both sides have room for a name."""
    shown = [1 / 1.1, 1.1]
    for comparison in comparisons:
        ratios = sorted(comparison.ratios)
        tenth = len(ratios) // 10  # those farthest out, of which one would squeeze all the others
        shown += [ratios[tenth], ratios[-1 - tenth], *(comparison.interval or ())]
    low, high = min(shown) / 1.05, max(shown) * 1.05
    return min(low, high**-0.25), max(high, low**-0.25)


def _draw_sides(axes: Axes, limits: tuple[float, float], cases: int) -> None:
    low, high = limits
    axes.set_xscale("log")
    axes.set(xlim=limits, ylim=(cases - 0.5, -0.5))
    axes.axvspan(low, 1, color=FASTER, linewidth=0, zorder=0)
    axes.axvspan(1, high, color=SLOWER, linewidth=0, zorder=0)
    axes.axvline(1, color="0.4", linewidth=1, zorder=1)
    for boundary in range(1, cases):
        axes.axhline(boundary - 0.5, color="white", linewidth=4, zorder=2)
    ticks = [tick for tick in (CLOSE_TICKS if high / low < 1.6 else TICKS) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    for text, offset, align in (("← fused faster", -6, "right"), ("slower →", 6, "left")):
        axes.annotate(
            *(text, (1, 1), (offset, 5)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            horizontalalignment=align,
            weight="bold",
        )


def _draw_comparison(axes: Axes, comparison: Comparison, y: float, limits: tuple[float, float], colour: str) -> None:
    low, high = limits
    inside = [ratio for ratio in comparison.ratios if low <= ratio <= high]
    axes.plot(inside, [y] * len(inside), DOT, color=colour, alpha=0.35, markersize=5, markeredgewidth=0, zorder=3)
    for end, marker, beyond in (
        (low, BEYOND_LOW, any(ratio < low for ratio in comparison.ratios)),
        (high, BEYOND_HIGH, any(ratio > high for ratio in comparison.ratios)),
    ):
        if beyond:
            axes.plot(end, y, marker, color=colour, alpha=0.6, markersize=6, clip_on=False, zorder=3)
    if comparison.interval is not None:
        axes.plot(comparison.interval, [y, y], color=colour, linewidth=3, solid_capstyle="butt", zorder=4)
    axes.plot(comparison.median, y, MEDIAN, color=colour, markersize=7, markeredgecolor="white", zorder=5)
    axes.annotate(
        *(comparison.verdict, (1, y), (10, 0)),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        verticalalignment="center",
        color=colour,
    )


def _legend(rivals: Sequence[str]) -> list[Line2D]:
    dots = [
        Line2D([], [], color=colour, marker=DOT, linestyle="", label=f"a pair with {rival}")
        for rival, colour in zip(rivals, COLOURS)
    ]
    label = f"median and its {CONFIDENCE:.0%} interval"
    median = Line2D([], [], color="0.3", marker=MEDIAN, markeredgecolor="white", markersize=8, linewidth=3, label=label)
    return [*dots, median]
