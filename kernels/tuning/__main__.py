"""The command: `python -m resnet.kernels.tuning list | clear | path`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from . import memory
from .memory import Choice


def _listing(entries: Mapping[str, Mapping[str, Choice]]) -> Iterator[str]:
    for environment, section in entries.items():
        yield environment
        for key, choice in section.items():
            yield f"  {key}"
            times = choice["milliseconds"]
            for name in sorted(times, key=times.__getitem__):
                yield f"    {'*' if name == choice['name'] else ' '} {times[name] * 1e3:10.1f} us  {name}"


def main(arguments: Sequence[str]) -> int:
    path = memory.process_choices.path or "no file: FUSED_RESIDUAL_CACHE is off"
    try:
        match arguments:
            case ["list"]:
                entries = memory.process_choices.entries()
                print(*_listing(entries) if entries else [f"nothing is remembered in {path}"], sep="\n")
            case ["clear"]:
                memory.process_choices.clear()
            case ["path"]:
                print(path)
            case _:
                print("usage: python -m resnet.kernels.tuning list | clear | path", file=sys.stderr)
                return 2
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
