"""The command that says how good a saved net is: `python -m resnet.evaluate --help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from resnet.commands import (
    DTYPES,
    check_backend,
    check_outputs,
    check_plot,
    find_device,
    require,
    require_count,
    require_limit,
    write_output,
    write_plot,
)
from resnet.data import CLASSES, Batches, DatasetError, load
from resnet.kernels.host.command import Parser, put, run
from resnet.training.checkpoints import SavedNet, read_net
from resnet.training.preparation import EVALUATION_BATCH
from resnet.training.result import versions


def _parser() -> Parser:
    parser = Parser(
        prog="python -m resnet.evaluate",
        description="Evaluates a net that `python -m resnet.train --save` has saved on the test images: "
        "accuracy, a table of the classes, the confusion matrix.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file that --save wrote")
    parser.add_argument(
        "--data",
        help="folder of Fashion-MNIST's four IDX files, searched and downloaded if not given; or one of PNG and JPEG "
        "images, as train/CLASS/NAME.png and test/CLASS/NAME.png",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="other than float32: by autocast; by default the training's")
    parser.add_argument("--batch-size", type=int, default=EVALUATION_BATCH, help="images at a time")
    parser.add_argument("--limit-test", type=int, metavar="N", help="only the first N test images")
    parser.add_argument("--json", metavar="PATH", help="all figures")
    parser.add_argument("--plot", metavar="PATH", help="the first images with their guesses, and the confusion matrix")
    return parser


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """What became of one class; the fractions are None where there is nothing to divide by."""

    name: str
    images: int
    right: int
    accuracy: float | None  # of the images of the class, how many were named so
    precision: float | None  # of the images that were named so, how many are of the class


def confusion(labels: Tensor, guesses: Tensor, classes: int = len(CLASSES)) -> Tensor:
    """How many images of the class of a row got the name of a column: int64 (classes, classes)."""
    return torch.bincount(labels * classes + guesses, minlength=classes**2).view(classes, classes)


def class_figures(matrix: Tensor, names: Sequence[str] = CLASSES) -> list[ClassFigures]:
    """The figures of each class, from a confusion matrix."""
    right, images, named = (counts.tolist() for counts in (matrix.diagonal(), matrix.sum(1), matrix.sum(0)))
    return [
        ClassFigures(name, of_class, hits, _fraction(hits, of_class), _fraction(hits, guessed))
        for name, of_class, hits, guessed in zip(names, images, right, named)
    ]


def _fraction(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def class_table(classes: Sequence[ClassFigures]) -> str:
    """A line per class."""

    def shown(fraction: float | None) -> str:
        return "-" if fraction is None else f"{fraction:.3f}"

    width = max(12, *(len(c.name) + 1 for c in classes))
    lines = [f"{'class':<{width}}{'images':>8}{'right':>8}{'accuracy':>10}{'precision':>11}"]
    lines += [
        f"{c.name:<{width}}{c.images:>8}{c.right:>8}{shown(c.accuracy):>10}{shown(c.precision):>11}" for c in classes
    ]
    return "\n".join(lines)


def confusion_table(matrix: Tensor, names: Sequence[str] = CLASSES) -> str:
    """A line per class, a column per guess, by the classes' numbers."""
    rows = matrix.tolist()
    width = max(4, *(len(str(count)) + 2 for row in rows for count in row))
    longest = max(11, *(len(name) + 1 for name in names))
    lines = [" " * (3 + longest) + "".join(f"{number:>{width}}" for number in range(len(names)))]
    for number, (name, row) in enumerate(zip(names, rows)):
        lines.append(f"{number:>2} {name:<{longest}}" + "".join(f"{count:>{width}}" for count in row))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 0; 1 for a file that cannot be written, 2 for what cannot be used, 130 after Ctrl-C."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    return run(parser, lambda: _evaluate(arguments), (DatasetError,))


def _evaluate(arguments: argparse.Namespace) -> int:
    device = find_device(arguments.device)
    require_count("--batch-size", arguments.batch_size)
    check_plot(arguments.plot)
    outputs = {"--json": arguments.json, "--plot": arguments.plot}
    check_outputs(outputs, {"CHECKPOINT": arguments.checkpoint})
    saved = read_net(arguments.checkpoint, device)
    check_backend(saved.impl, device)
    saved = dataclasses.replace(saved, dtype=arguments.dtype or saved.dtype)
    data = load(arguments.data)
    require(data.spec == saved.images, "--data", f"{saved.images}, as the net was trained on", data.spec)
    require_limit("--limit-test", arguments.limit_test, len(data.test_images), data.source)
    images, labels = data.test_images[: arguments.limit_test], data.test_labels[: arguments.limit_test]

    batches = Batches(images, labels, arguments.batch_size, device=device, resize=saved.resize)
    guesses = saved.logits(x for x, _ in tqdm(batches, desc="evaluating", unit="batch")).argmax(1)
    names = data.classes
    matrix = confusion(labels, guesses, len(names))
    classes = class_figures(matrix, names)
    report = _report(arguments.checkpoint, saved, data.source, matrix, classes)
    try:
        put(
            f"test acc {report['accuracy']:.3f}: {report['right']} of {report['images']} images of {data.source}\n"
            f"{saved.impl} {saved.model} of recipe {saved.recipe} after {saved.epoch} epochs, "
            f"images {saved.resize}x{saved.resize}, {saved.dtype} on {device}\n\n{class_table(classes)}\n\n"
            f"confusion matrix: a row is a class, a column a guess\n{confusion_table(matrix, names)}"
        )
    finally:
        if arguments.json is not None:
            write_output(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
        if arguments.plot is not None:
            from resnet import plots  # here, since it needs matplotlib, which the rest does without

            write_plot(arguments.plot, plots.evaluation(images, labels, guesses, matrix, names))
    return 0


def _report(
    checkpoint: str, saved: SavedNet, source: str, matrix: Tensor, classes: Sequence[ClassFigures]
) -> dict[str, Any]:
    """All figures, as JSON's types."""
    right, images = int(matrix.diagonal().sum()), int(matrix.sum())
    return {
        "accuracy": right / images,
        "right": right,
        "images": images,
        "classes": [dataclasses.asdict(figures) for figures in classes],
        "confusion": matrix.tolist(),
        "checkpoint": checkpoint,
        **{name: getattr(saved, name) for name in ("model", "impl", "recipe", "resize", "dtype", "epoch")},
        "device": str(saved.device),
        "data": source,
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
