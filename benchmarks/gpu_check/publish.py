"""The documents' GPU tables, made from a check's results: `python -m benchmarks.gpu_check.publish gpu-check/DIR`.

Keeps the results as results/<device>-<date>.json, with the commit in the name where another check has that one, and
writes what stands between `<!-- gpu: NAME -->` and `<!-- end -->` in README.md and docs/performance.md. A table is made
of the newest results that have its stage whole: where time was short a run has not all of them. Without a folder the
tables are made of the files that were kept.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common import purpose
from benchmarks.gpu_check.environment import ROOT
from benchmarks.gpu_check.report import NET_CASES, Results, gaps_table, parity_table, table, times_table
from resnet.commands import require
from resnet.kernels.host.command import ConfigError, Parser, run

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
SIDES = ("fused", "eager", "compile")  # of the summary
KEPT = ROOT / "results"
# By stage, the rows that its table needs, each row of the stage where none is named, and what a row needs.
_NEEDED = {
    "net": ([f"{case}, {kind}" for case in NET_CASES for kind in SIDES], {"replayed_ms", "launched_ms"}),
    "kernels": (["training"], {"gaps"}),
    "textbook": (["fused", "eager"], {"loss"}),
    "blocks": ([], {"launched_ms"}),
    "model": ([], {"launched_ms"}),
    "parity": ([], {"tiles"}),
}
NOT_YET = "No run has measured it yet."
_WIDTH = 120  # of the documents' lines
_BLOCK = re.compile(r"(<!-- gpu: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(folder: Path) -> Results:
    """A check's results. Not each kernel's every launch, nor the folder of the data set.

    ConfigError where the folder has no results, or those of a check that found no GPU or no ceilings.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        devices, _ = results["environment"]["environment"]["devices"], _time(results)
        ceilings = results["environment"]["ceilings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"folder: expected one that benchmarks.gpu_check wrote, got {folder} ({error})") from None
    require(bool(devices), "folder", "a check of a GPU", f"{folder}, which ran without one")
    require("error" not in ceilings, "folder", "a check that measured the device's ceilings", folder)
    for stage, part in (("kernels", "rows"), ("textbook", "data")):
        for found in results.get(stage, {}).values():
            if isinstance(found, dict):
                found.pop(part, None)
    return results


def place(results: Results) -> Path:
    """Where a check's results are kept: no other check's place. Its name has the commit and the time where it must."""
    known = results["environment"]["environment"]
    device = re.sub(r"\W+", "-", known["devices"][0]["name"].lower())
    parts = f"{device}-{known['time'][:10]}", str(known["commit"]), known["time"][11:19].replace(":", "")
    paths = [KEPT / f"{'-'.join(parts[:count])}.json" for count in (1, 2, 3)]
    free = (path for path in paths if not path.exists() or _time(json.loads(path.read_text())) == known["time"])
    return next(free, paths[-1])


def kept_results() -> list[Results]:
    """What was kept, the newest first."""
    return _newest_first(json.loads(path.read_text()) for path in KEPT.glob("*.json"))


def _newest_first(checks: Iterable[Results]) -> list[Results]:
    return sorted(checks, key=_time, reverse=True)


def _time(results: Results) -> str:
    return results["environment"]["environment"]["time"]


def is_whole(results: Results, stage: str) -> bool:
    """Whether the stage has all rows that its table is made of: not where it was cut short, or one is an error."""
    names, keys = _NEEDED[stage]
    found = results.get(stage, {})
    rows = [found.get(name) for name in names or found]
    return bool(rows) and all(isinstance(r, dict) and "error" not in r and keys <= r.keys() for r in rows)


def tables(kept: Sequence[Results]) -> dict[str, str]:
    """The text of each block, by its name, of results with the newest first.

    A setting is that of the net's tables, or of the stage that it names.
    """
    of = {stage: next((results for results in kept if is_whole(results, stage)), None) for stage in _NEEDED}
    made = {
        "setting": ("net", setting),
        **{f"setting {stage}": (stage, setting) for stage in _NEEDED},
        "summary": ("net", lambda found: summary_table(found["net"])),
        "training": ("net", lambda found: net_table(found, NET_CASES[0])),
        "inference": ("net", lambda found: net_table(found, NET_CASES[1])),
        "gaps": ("kernels", lambda found: gaps_table(found["kernels"]["training"]["gaps"])),
        "textbook": ("textbook", textbook_table),
        "blocks": ("blocks", lambda found: times_table(found["blocks"], "block ")),
        "model": ("model", lambda found: f"{setting(found)}\n\n{times_table(found['model'], '')}"),
        "parity": ("parity", lambda found: parity_table(found["parity"])),
    }
    return {name: NOT_YET if of[stage] is None else make(of[stage]) for name, (stage, make) in made.items()}


def setting(results: Results) -> str:
    known, ceilings = results["environment"]["environment"], results["environment"]["ceilings"]
    packages = known["packages"]
    copy, product = ceilings["bytes_per_second"] / 1e9, ceilings["operations_per_second"] / 1e12
    text = (
        f"{known['devices'][0]['name']}, torch {packages['torch']}, triton {packages['triton']}, "
        f"{known['time'][:10]}, commit {known['commit']}; a large copy moves {copy:.0f} GB/s there, a large product "
        f"does {product:.0f} TFLOP/s."
    )
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def summary_table(net: Results) -> str:
    """A line for each case and way to launch it: fused, its rivals, and how many times as fast fused is."""
    rows = []
    for case, label in zip(NET_CASES, ("training step", "inference")):
        fused, eager, compiled = (net[f"{case}, {kind}"] for kind in SIDES)
        for key, how in (("replayed_ms", "as a CUDA graph"), ("launched_ms", "launched by Python")):
            ours, *rivals = (row[key][0] for row in (fused, eager, compiled))
            cells = [f"{rival:.2f} ms (**{rival / ours:.2f}x**)" for rival in rivals]
            rows.append((f"{label}, {how}", f"{ours:.2f} ms", *cells))
    return table(("", "fused", "eager", "torch.compile"), rows)


def net_table(results: Results, case: str) -> str:
    return times_table({**results["net"], **results.get("max-autotune", {})}, f"{case}, ")


def textbook_table(results: Results) -> str:
    known = results["environment"]["environment"]
    where = f"10 epochs on {known['devices'][0]['name']}, commit {known['commit']}"
    rows = [
        (
            model,
            f"{row['loss']:.3f}",
            f"{row['train_acc']:.3f}",
            f"{row['test_acc']:.3f}",
            f"{row['examples_per_sec']:.1f}",
        )
        for model, row in results["textbook"].items()
        if "loss" in row
    ]
    return table((where, "loss", "train acc", "test acc", "examples/sec"), rows)


def rewritten(text: str, blocks: dict[str, str]) -> str:
    """`text` with what its blocks hold made anew. KeyError for a block that no table is for."""
    return _BLOCK.sub(lambda m: f"{m[1]}{blocks[m[2]]}\n{m[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.gpu_check.publish", description=purpose(__doc__))
    parser.add_argument("folder", type=Path, nargs="?", help="of a finished check (default: of what was kept alone)")
    args = parser.parse_args(argv)
    return run(parser, lambda: _publish(args.folder))


def _publish(folder: Path | None) -> int:
    kept = kept_results()
    if folder is not None:
        new = read(folder)
        kept = _newest_first([new, *(results for results in kept if _time(results) != _time(new))])
    if not kept:
        raise ConfigError(f"no results in {KEPT}: name the folder of a check")
    blocks = tables(kept)
    texts = {document: rewritten(document.read_text(), blocks) for document in DOCUMENTS}
    if folder is not None:  # once nothing can fail, since what is kept is read by each later call
        path = place(new)
        KEPT.mkdir(exist_ok=True)
        path.write_text(json.dumps(new, indent=1) + "\n")
        print(f"kept as {path.relative_to(ROOT)}")
        if cut := [stage for stage in _NEEDED if not is_whole(new, stage)]:
            print(f"not whole in it, so that no table is made of them: {', '.join(cut)}")
    for document, text in texts.items():
        document.write_text(text)
    print(f"tables of {', '.join(p.name for p in DOCUMENTS)} made of {len(kept)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
