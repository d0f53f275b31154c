"""What was found, as Markdown. Every figure is read from `results`; none is written here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

Results = dict[str, dict]
NET_CASES = ("ResNet-18 training", "ResNet-18 inference")
_PROGRESS = re.compile(r"^[.FEsxX]+(?= *(?:\[ *\d+%\])?$)", re.MULTILINE)  # a line of pytest's


def failures(results: Results) -> Iterator[str]:
    """What failed, a line each."""
    for stage, found in results.items():
        if stage == "seconds":
            continue
        for name, result in found.items():
            if not isinstance(result, dict):
                continue
            if "error" in result:
                yield f"{stage}: {name}: {result['error']}"
            elif result.get("passed") is False:
                share = f"{result['share_of_allowed']:.2f} of the allowed error in {result['of']}, {result['with']}"
                yield f"{stage}: {name}: {share}"
            elif result.get("status") not in (0, None) or result.get("failed"):  # of a command
                yield f"{stage}: {name}: {result['end']}"


def left_out(results: Results) -> Iterator[str]:
    """What was not measured since the time ended, a line each."""
    for stage, found in results.items():
        if "not all of it" in found:
            yield f"{stage}: {found['not all of it']}"
        for name, result in found.items():
            if isinstance(result, dict) and result.get("status", 0) is None:  # of a command
                yield f"{stage}: {name}: {result['end']}"


def ended(status: int | None, log: Path) -> dict[str, object]:
    """How pytest ended, by its status, None where it was stopped, and its log: then its failures are counted.

    It prints lines of a letter for each test, then a line that begins with "==" or, after Ctrl-C, "!!", and tracebacks.
    """
    text = log.read_text(errors="replace")
    end = " ".join(text.splitlines()[-1:])
    if status is not None:
        return {"status": status, "end": end}
    progress = re.split("^[=!]{2}", text, maxsplit=1, flags=re.MULTILINE)[0]
    failed = sum(line.count("F") + line.count("E") for line in _PROGRESS.findall(progress))
    what = f"{failed} tests had failed when the time ended; see {log.name}" if failed else f"not ended in time: {end}"
    return {"status": None, "failed": failed, "end": what}


def summary(results: Results) -> str:
    """A few lines for a terminal."""
    lines = [f"failed: {line}" for line in failures(results)] or ["nothing failed"]
    lines += [f"left out: {line}" for line in left_out(results)]
    for case in NET_CASES:
        lines += [f"{case}, {row}" for row in _sentences(results.get("net", {}), case)]
    return "\n".join(lines)


def _sentences(net: Results, case: str) -> Iterator[str]:
    for name, row in net.items():
        if name.startswith(f"{case}, ") and "launched_ms" in row:
            replayed = f", replayed {row['replayed_ms'][0]:.2f} ms" if "replayed_ms" in row else ""
            yield f"{name.removeprefix(f'{case}, ')}: launched {row['launched_ms'][0]:.2f} ms{replayed}"


def markdown(results: Results) -> str:
    """The whole report."""
    parts = ["# What the GPU said", *_environment(results)]
    parts += ["## What failed", *([f"* {line}" for line in failures(results)] or ["Nothing."])]
    parts += ["## What was left out", *([f"* {line}" for line in left_out(results)] or ["Nothing."])]
    for case in NET_CASES:
        rows = {**results.get("net", {}), **results.get("max-autotune", {})}
        parts += [f"## {case}", times_table(rows, f"{case}, ")]
    for mode, found in results.get("kernels", {}).items():
        if isinstance(found, dict) and "gaps" in found:
            parts += [f"## Kernels of a fused step, {mode}", _where_time_goes(results, mode, found)]
            parts += ["The largest gaps to the least that the ceilings allow (modelled):", gaps_table(found["gaps"])]
            parts += ["All kernels:", totals_table(found["totals"])]
    parts += ["## The textbook's training", *_textbook(results.get("textbook", {}))]
    parts += ["## Blocks, forward and backward", times_table(results.get("blocks", {}), "block ")]
    parts += ["## A published net", times_table(results.get("model", {}), "")]
    parts += ["## Parity", parity_table(results.get("parity", {}))]
    for stage, title in (("tests", "Tests"), ("sanitizer", "compute-sanitizer")):
        parts += [f"## {title}", *_ends(results.get(stage, {}))]
    parts += ["## Seconds of each stage", ", ".join(f"{n} {s}" for n, s in results.get("seconds", {}).items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ends(found: dict) -> Iterator[str]:
    """How each command of a stage ended."""
    for name, result in found.items():
        if isinstance(result, dict) and "end" in result:
            yield f"{name}: {result['end']}"


def _environment(results: Results) -> list[str]:
    found = results.get("environment", {})
    known, ceilings = found.get("environment", {}), found.get("ceilings", {})
    lines = []
    if devices := known.get("devices"):
        packages = ", ".join(f"{name} {version}" for name, version in known["packages"].items() if version)
        lines.append(f"{devices[0]['name']}, driver {known['driver']}, {packages}, commit {known['commit']}.")
    if "bytes_per_second" in ceilings:
        lines.append(
            f"Ceilings: {ceilings['bytes_per_second'] / 1e9:.0f} GB/s of a large copy, read and written; "
            f"{ceilings['operations_per_second'] / 1e12:.0f} TFLOP/s of a large product."
        )
    return lines


def _where_time_goes(results: Results, mode: str, found: dict) -> str:
    busy = sum(time for _, time in found["totals"].values()) / 1e3
    row = results.get("net", {}).get(f"ResNet-18 {mode}, fused", {})
    if "replayed_ms" not in row:
        return f"The device is busy for {busy:.3f} ms of a step."
    return (
        f"The device is busy for {busy:.3f} ms of a step, which takes {row['replayed_ms'][0]:.3f} ms as a CUDA graph "
        f"and {row['launched_ms'][0]:.3f} ms launched by Python: the rest is waiting for the host."
    )


# ---- tables ----------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def times_table(found: Results, prefix: str) -> str:
    """Milliseconds of the rows whose name starts with `prefix`: medians, with 20% and 80% quantiles."""
    rows = []
    for name, row in found.items():
        if not name.startswith(prefix) or not isinstance(row, dict):
            continue
        cells = (_quantiles(row.get("replayed_ms")), _quantiles(row.get("launched_ms")))
        rows.append((name.removeprefix(prefix), *(cells if "error" not in row else (row["error"][:80], "-"))))
    return table(("", "CUDA graph, ms", "launched, ms"), rows) if rows else ""


def _quantiles(times: list[float] | None) -> str:
    return "-" if times is None else f"{times[0]:.3f} ({times[1]:.3f} to {times[2]:.3f})"


def gaps_table(gaps: list[dict]) -> str:
    rows = [
        (
            row["kernel"],
            row["what"],
            str(row["count"]),
            f"{row['microseconds']:.1f}",
            f"{row['least_microseconds']:.1f}",
            f"{row['bytes'] / row['microseconds'] / 1e3:.0f}",
            f"{row['operations'] / row['microseconds'] / 1e6:.0f}" if row["operations"] else "-",
        )
        for row in gaps
    ]
    return table(("kernel", "largest tensor, tile", "launches", "us", "least, us", "GB/s", "TFLOP/s"), rows)


def totals_table(totals: dict[str, tuple[int, float]]) -> str:
    rows = [(name.replace("|", "/"), str(count), f"{time:.1f}") for name, (count, time) in totals.items()]
    return table(("kernel", "launches", "us"), rows)


def parity_table(found: Results) -> str:
    rows = [
        (name, str(row["tiles"]), f"{row['share_of_allowed']:.2f}", row["of"])
        for name, row in found.items()
        if isinstance(row, dict) and "tiles" in row
    ]
    return table(("block", "tiles", "worst error over what is allowed", "of"), rows) if rows else ""


def _textbook(found: Results) -> list[str]:
    return [f"{model}: {'; '.join(row['said'])} ({row['data']})" for model, row in found.items() if "said" in row]
