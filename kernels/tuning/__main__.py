"""The command: `python -m resnet.kernels.tuning list | clear | path`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from ..host.command import Parser, run
from . import memory
from .memory import Choice


def _parser() -> Parser:
    parser = Parser(prog="python -m resnet.kernels.tuning", description="The timed choices that are remembered.")
    commands = parser.add_subparsers(dest="command", metavar="list | clear | path", required=True)
    commands.add_parser("list", help="print what is remembered, with the median times")
    commands.add_parser("clear", help="forget all of it")
    commands.add_parser("path", help="print where it is")
    return parser


def _listing(entries: Mapping[str, Mapping[str, Choice]]) -> Iterator[str]:
    for environment, section in entries.items():
        yield environment
        for key, choice in section.items():
            yield f"  {key}"
            times = choice["milliseconds"]
            for name in sorted(times, key=times.__getitem__):
                yield f"    {'*' if name == choice['name'] else ' '} {times[name] * 1e3:10.1f} us  {name}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    command = parser.parse_args(arguments).command
    return run(parser, lambda: _do(command))


def _do(command: str) -> int:
    path = memory.process_choices.path
    if command == "list":
        entries = memory.process_choices.entries()
        nothing = f"nothing is remembered in {path}" if path else "nothing is remembered: FUSED_RESIDUAL_CACHE is off"
        print(*_listing(entries) if entries else [nothing], sep="\n")
    elif command == "clear":
        memory.process_choices.clear()
    else:
        print(path or "no file: FUSED_RESIDUAL_CACHE is off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
