"""Where files are kept for a user, and how they are written. The rules of the whole package."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # on Windows; there a killed process's part cannot be told from one that is being written
    fcntl = None

_PART = re.compile(r"\.[0-9a-f]{16}\.part(\..*)?")
_KINDS = {
    "folder": stat.S_ISDIR,
    "pipe": stat.S_ISFIFO,
    "socket": stat.S_ISSOCK,
    "character device": stat.S_ISCHR,
    "block device": stat.S_ISBLK,
}


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


def irregular(path: Path) -> str | None:
    """What `path` names, links followed, where that is no regular file, such as "pipe"; else, or for nothing, None.

    OSError for a path that cannot name a file: a name that is too long, a circle of links. ValueError for a NUL in it.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((kind for kind, is_kind in _KINDS.items() if is_kind(mode)), None)


def check_regular(path: Path) -> None:
    """OSError where `path` names a folder, a pipe, a socket or a device."""
    kind = irregular(path)
    if kind is not None:
        raise OSError(errno.EINVAL, f"expected a regular file, got a {kind}", str(path))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write` to a file beside `path`, then rename: readers find the old file or the new one, never a part.

    The new one is on the disk before it takes the old one's name. A link is followed: what it names is replaced. Parts
    that killed processes have left in the folder are removed. OSError, before anything is written, where `path` names
    something that is no regular file.
    """
    path = Path(os.path.realpath(path))
    check_regular(path)
    _remove_abandoned(path.parent)
    part, handle = _new_part(path.parent)
    try:
        with open(handle, "wb+") as file:
            write(file)
            file.flush()
            os.fsync(handle)
            if fcntl is not None:
                os.replace(part, path)  # while it is locked
        if fcntl is None:
            os.replace(part, path)  # Windows renames no open file
    finally:
        part.unlink(missing_ok=True)


def _new_part(folder: Path) -> tuple[Path, int]:
    """A new empty file, open, and locked while it is open: a part without a lock was abandoned."""
    while True:
        part = folder / f".{secrets.token_hex(8)}.part"  # short, so that it is allowed wherever the file's name is
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is None:
            return part, handle
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return part, handle
        os.close(handle)  # another process took it for abandoned before it was locked


def _remove_abandoned(folder: Path) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # a folder that may not be listed
        for name in filter(_PART.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):  # it is in use, or gone, or another user's
                _remove_unlocked(folder / name)


def _remove_unlocked(part: Path) -> None:
    if not stat.S_ISREG(os.lstat(part).st_mode):
        return
    handle = os.open(part, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
    finally:
        os.close(handle)
