"""The command that draws training runs beside each other: `python -m resnet.curves --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet.commands import check_outputs, check_plot, write_plot
from resnet.kernels.host.command import ConfigError, Parser, put, run

FIGURES = ("loss", "train_acc", "test_acc")  # of each epoch


def _parser() -> Parser:
    parser = Parser(
        prog="python -m resnet.curves",
        description="Draws loss and accuracies per epoch of runs of `python -m resnet.train --json` in one picture, "
        "and prints a line per run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="file that --json wrote; its name is the curve's")
    parser.add_argument("--out", default="curves.png", metavar="PATH", help="the picture")
    return parser


def read(path: str) -> list[dict[str, float]]:
    """The figures of a run's epochs. ConfigError, which names the file, where it has none."""
    try:
        epochs = json.loads(Path(path).read_bytes())["epochs"]
        found = [{name: float(epoch[name]) for name in FIGURES} for epoch in epochs]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{path}: expected what python -m resnet.train --json writes") from None
    if not found:
        raise ConfigError(f"{path}: its run has no whole epoch")
    return found


def named(paths: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Each run's epochs by the shortest names that tell the files apart: the last parts of their paths."""
    runs = [read(path) for path in paths]
    parts = [Path(os.path.abspath(path)).with_suffix("").parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ConfigError("RUN: expected files of different names")
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return {"/".join(p[-length:]): run for p, run in zip(parts, runs)}


def line(name: str, epochs: Sequence[dict[str, float]]) -> str:
    best = max(range(len(epochs)), key=lambda i: epochs[i]["test_acc"])
    last = epochs[-1]
    return (
        f"{name}: {len(epochs)} epochs, loss {last['loss']:.3f}, train acc {last['train_acc']:.3f}, "
        f"test acc {last['test_acc']:.4f}; the highest test acc is {epochs[best]['test_acc']:.4f}, of epoch {best + 1}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 0; 1 where the picture cannot be written, 2 for what cannot be used."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    return run(parser, lambda: _draw(arguments))


def _draw(arguments: argparse.Namespace) -> int:
    check_plot(arguments.out, "--out")
    check_outputs({"--out": arguments.out}, {f"RUN {path}": path for path in arguments.runs})
    runs = named(arguments.runs)
    from resnet import plots  # here, since it needs matplotlib, which `check_plot` asks for

    write_plot(arguments.out, plots.runs(runs))
    put("\n".join(line(name, epochs) for name, epochs in runs.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
