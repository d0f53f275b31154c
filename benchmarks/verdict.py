"""Whether fused is faster: from rounds that it and a rival both took, the ratio of each round, and words for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
# Parts of their time in which threads waited for a CPU. Pairing makes up for a slow machine, not for this: it slows
# most what has many short parallel sections, each of which ends with its last thread.
SUSPECT, TOO_BUSY = 0.1, 0.5


@dataclass(frozen=True)
class Comparison:
    """Fused against one rival: the time of fused over the rival's, round by round. Below 1 fused is the faster.

    Both times of a ratio are of the same round, so what slowed that round drops out. Percentages are of the shorter
    time: "14% faster" is a rival that takes 14% longer, "14% slower" is fused that takes 14% longer.
    """

    rival: str
    ratios: tuple[float, ...]
    waited: float = 0.0  # the part of the time in which threads waited for a CPU, from 0 to 1

    @classmethod
    def of_rounds(
        cls, rival: str, fused_seconds: Iterable[float], rival_seconds: Iterable[float], waited: float = 0.0
    ) -> Comparison:
        """Raises ValueError unless both have the same rounds, one or more."""
        ratios = tuple(fused / other for fused, other in zip(fused_seconds, rival_seconds, strict=True))
        if not ratios:
            raise ValueError("expected one round or more, got none")
        return cls(rival, ratios, waited)

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """A confidence interval of the median, at CONFIDENCE; None where the rounds are too few to have one.

        It is bounded by two of the ratios, which makes no assumption of how they are distributed.
        """
        skipped = _skipped_ranks(len(self.ratios))
        if skipped is None:
            return None
        ratios = sorted(self.ratios)
        return ratios[skipped], ratios[-1 - skipped]

    @property
    def verdict(self) -> str:
        """Such as "fused 14% faster"; "no difference seen" where the interval has 1 in it; or why there is none."""
        if self.waited >= TOO_BUSY:
            return "CPUs too busy"
        if self.interval is None:
            return "too few rounds"
        low, high = self.interval
        if low <= 1 <= high:
            return "no difference seen"
        return f"fused {_by(self.median, _is_large(low, high))} {_side(self.median)}"

    @property
    def spread(self) -> str:
        """The interval in the verdict's words, such as "5% to 21%", or "5% faster to 3% slower".

        "" where there is no verdict, so that nobody reads one from it.
        """
        if self.interval is None or self.waited >= TOO_BUSY:
            return ""
        low, high = self.interval
        as_multiple = _is_large(low, high)
        if low <= 1 <= high:
            return f"{_by(low, as_multiple)} faster to {_by(high, as_multiple)} slower"
        nearer, farther = (high, low) if high < 1 else (low, high)
        return f"{_by(nearer, as_multiple)} to {_by(farther, as_multiple)}"


def _is_large(low: float, high: float) -> bool:
    """Whether one may take twice as long as the other; all figures of the line are then multiples."""
    return low <= 0.5 or high >= 2


def _side(ratio: float) -> str:
    return "faster" if ratio < 1 else "slower"


def _by(ratio: float, as_multiple: bool) -> str:
    """How much longer the slower one takes: "14%", or "3.4x" as a multiple."""
    multiple = max(ratio, 1 / ratio)
    if as_multiple:
        return f"{multiple:.1f}x"
    return "under 1%" if multiple < 1.01 else f"{100 * (multiple - 1):.0f}%"


def _skipped_ranks(n: int) -> int | None:
    """How many of n sorted values may be left out at each end of a confidence interval of the median.

    Each value is below the median with probability 1/2, so that the number of those below is binomial. None where
    even the smallest to the largest value is not an interval at CONFIDENCE.
    """
    skipped, tail = None, 0.0
    for below in range(n):
        tail += math.comb(n, below) / 2**n
        if tail > (1 - CONFIDENCE) / 2:
            break
        skipped = below
    return skipped


def best_rival(comparisons: Sequence[Comparison]) -> Comparison:
    """The one against which fused does worst."""
    return max(comparisons, key=lambda comparison: comparison.median)


def busy_note(waited: float) -> str | None:
    """A caution, where threads waited for a CPU during `waited`, from 0 to 1, of their time and that is suspect."""
    if waited < SUSPECT:
        return None
    return (
        f"CPUs were busy with other work: threads waited for one up to {waited:.0%} of their time.\n"
        "That slows most what has many short parallel sections; for a verdict to rely on, run it on an idle machine."
    )


# ---- the table of a whole run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One workload's line of the verdict."""

    workload: str
    comparison: Comparison  # with the best rival
    kept: float | None  # bytes that fused keeps for backward, over eager's; None where not counted
    examples_per_second: float  # by fused


def table(lines: Sequence[Line]) -> list[str]:
    """The lines in aligned columns, under their names."""
    cells = [("", "", "best rival", f"{CONFIDENCE:.0%} interval", "rounds", "bytes kept", "examples/s")]
    for line in lines:
        kept = "" if line.kept is None else f"{line.kept:.2f}"
        comparison = line.comparison
        words = line.workload, comparison.verdict, comparison.rival, comparison.spread
        cells.append((*words, str(len(comparison.ratios)), kept, f"{line.examples_per_second:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    aligned = [[*map(str.ljust, row[:4], widths[:4]), *map(str.rjust, row[4:], widths[4:])] for row in cells]
    return ["  ".join(row).rstrip() for row in aligned]
