"""The documents' GPU tables, made from a check's results: `python -m benchmarks.gpu_check.publish gpu-check/DIR`.

Keeps the results as results/<device>-<date>.json, and writes what stands between `<!-- gpu: NAME -->` and
`<!-- end -->` in README.md and docs/performance.md. A table is made of the newest results that have its stage: where
time was short a run has not all of them. Without a folder the tables are made of the files that were kept.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.environment import ROOT
from benchmarks.gpu_check.report import NET_CASES, Results, gaps_table, parity_table, table, times_table
from resnet.kernels.host.command import ConfigError, Parser, run

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
KEPT = ROOT / "results"
NOT_YET = "No run has measured it yet."
_WIDTH = 120  # of the documents' lines
_BLOCK = re.compile(r"(<!-- gpu: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def keep(folder: Path) -> Path:
    """Copies a check's results; where they are kept. Not each kernel's every launch, nor the folder of the data set.

    ConfigError where the folder has no results.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"folder: expected one that benchmarks.gpu_check wrote, got {folder} ({error})") from None
    for found in results.get("kernels", {}).values():
        found.pop("rows", None)
    for found in results.get("textbook", {}).values():
        found.pop("data", None)
    known = results["environment"]["environment"]
    device = re.sub(r"\W+", "-", known["devices"][0]["name"].lower())
    path = KEPT / f"{device}-{known['time'][:10]}.json"
    KEPT.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def kept_results() -> list[Results]:
    """What was kept, the newest first."""
    kept = [json.loads(path.read_text()) for path in KEPT.glob("*.json")]
    return sorted(kept, key=lambda results: results["environment"]["environment"]["time"], reverse=True)


def tables(kept: Sequence[Results]) -> dict[str, str]:
    """The text of each block, by its name, of results with the newest first.

    A setting is that of the net's tables, or of the stage that it names.
    """
    of = {stage: next(r for r in kept if r.get(stage)) for stage in ("net", "kernels", "textbook", "blocks", "parity")}
    net = of["net"]["net"]
    model = next((r for r in kept if r.get("model")), None)
    return {
        "setting": setting(of["net"]),
        **{f"setting {stage}": setting(results) for stage, results in of.items()},
        "summary": summary_table(net),
        **{
            mode: times_table({**net, **of["net"].get("max-autotune", {})}, f"{case}, ")
            for mode, case in zip(("training", "inference"), NET_CASES)
        },
        "gaps": gaps_table(of["kernels"]["kernels"]["training"]["gaps"]),
        "textbook": textbook_table(of["textbook"]),
        "blocks": times_table(of["blocks"]["blocks"], "block "),
        "model": NOT_YET if model is None else f"{setting(model)}\n\n{times_table(model['model'], '')}",
        "parity": parity_table(of["parity"]["parity"]),
    }


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
        fused, eager, compiled = (net[f"{case}, {kind}"] for kind in ("fused", "eager", "compile"))
        for key, how in (("replayed_ms", "as a CUDA graph"), ("launched_ms", "launched by Python")):
            ours, *rivals = (row[key][0] for row in (fused, eager, compiled))
            cells = [f"{rival:.2f} ms (**{rival / ours:.2f}x**)" for rival in rivals]
            rows.append((f"{label}, {how}", f"{ours:.2f} ms", *cells))
    return table(("", "fused", "eager", "torch.compile"), rows)


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
    parser = Parser(prog="python -m benchmarks.gpu_check.publish", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of a finished check (default: of what was kept alone)")
    args = parser.parse_args(argv)
    return run(parser, lambda: _publish(args.folder))


def _publish(folder: Path | None) -> int:
    if folder is not None:
        print(f"kept as {keep(folder).relative_to(ROOT)}")
    kept = kept_results()
    if not kept:
        raise ConfigError(f"no results in {KEPT}: name the folder of a check")
    blocks = tables(kept)
    for document in DOCUMENTS:
        document.write_text(rewritten(document.read_text(), blocks))
    print(f"tables of {', '.join(p.name for p in DOCUMENTS)} made of {len(kept)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
