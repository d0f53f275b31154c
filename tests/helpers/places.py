"""What may be in a file's place: functions that make it, by what errors call it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # from the current folder: an address is short


PLACES = {"folder": Path.mkdir, "pipe": os.mkfifo, "socket": _socket, "character device": _device}
