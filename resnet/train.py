"""The command that trains ResNet-18 on Fashion-MNIST: `python -m resnet.train --help`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from resnet.commands import ConfigError, Parser
from resnet.data import DatasetError
from resnet.kernels.host.files import write_atomically
from resnet.training import CUDA_GRAPHS, DTYPES, MODELS, NonFiniteError, TrainConfig, train

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended: 128 + SIGINT


def _parser() -> argparse.ArgumentParser:
    default = TrainConfig()
    parser = Parser(
        prog="python -m resnet.train",
        description="Trains ResNet-18 on Fashion-MNIST and prints its loss, accuracies and examples/sec.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default=default.model, help="compile: torch.compile of eager")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="passes over the training set")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="images per step")
    parser.add_argument("--lr", type=float, default=default.lr, help="learning rate of plain SGD")
    parser.add_argument("--resize", type=int, default=default.resize, help="height and width of the images, in pixels")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="other than float32: by autocast")
    parser.add_argument(
        "--cuda-graph",
        choices=CUDA_GRAPHS,
        default=default.cuda_graph,
        help="replay the steps of whole batches as a CUDA graph; auto: on a CUDA device, but not with --model compile",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the first weights and the order of images")
    parser.add_argument("--data", help="folder of Fashion-MNIST's four IDX files; searched and downloaded if not given")
    parser.add_argument("--limit-train", type=int, metavar="N", help="only the first N training images")
    parser.add_argument("--limit-test", type=int, metavar="N", help="only the first N test images")
    parser.add_argument("--save", metavar="PATH", help="checkpoint, replaced after every epoch and at Ctrl-C")
    parser.add_argument("--json", metavar="PATH", help="figures of the run, per epoch and in all")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status 0; 1 for a non-finite loss, 2 for what cannot be used, 130 after Ctrl-C."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        result = train(TrainConfig(**vars(arguments)))
    except (ConfigError, DatasetError) as error:
        parser.error(str(error))
    except NonFiniteError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing written since the last checkpoint, if there was one", file=sys.stderr)
        return INTERRUPTED
    if arguments.json is not None:
        text = json.dumps(result.to_json(), indent=2) + "\n"
        write_atomically(Path(arguments.json), lambda temporary: temporary.write_text(text))
    if result.interrupted:
        left = f"checkpoint in {result.checkpoint}" if result.checkpoint else "before the first step, nothing to save"
        print(f"interrupted after {len(result.epochs)} epochs; {left}", file=sys.stderr)
        return INTERRUPTED
    print(result.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
