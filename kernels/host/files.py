"""Where files are kept for a user, and how they are written. The rules of the whole package."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder for what the package keeps between runs, None where there is none; it need not exist yet.

    `FUSED_RESIDUAL_CACHE` names it ("off": none). Else it is fused-residual in `XDG_CACHE_HOME`, or in ~/.cache where
    that is unset or, as the XDG specification has it, relative.
    """
    folder = environment.get("FUSED_RESIDUAL_CACHE")
    if folder == "off":
        return None
    if folder:
        return Path(folder)
    home = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.cache")
    return Path(home) / "fused-residual" if os.path.isabs(home) else None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` to a file beside `path`, then rename: readers find the old file or the new one, never a part.

    The new one is on the disk before it takes the old one's name. The part has the suffix of `path`, which some
    writers take for the format.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
