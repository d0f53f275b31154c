"""The heap of a process that trains: on a CPU each step frees what the next one takes."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_OF_USERS = {f"MALLOC_{name}_" for name in ("MMAP_MAX", "MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")}


def keep_freed_memory() -> None:
    """Let what this process frees stay its own.

    glibc gives the memory of a large tensor back to the system, which fills the next one's with zeros page by page.
    Another C library is left alone, and so is one that the environment has set up.
    """
    if _OF_USERS & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
