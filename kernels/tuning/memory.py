"""Timed choices between ways to run the same thing, remembered: in memory, and in a per-user file for the next process.

    name = memory.choose(key, {"one way": run_one_way, "another": run_another}, device)

The first call of a key on a GPU compiles the candidates side by side and times them; every later one is a dict lookup.
A candidate is called several times, so it must not change what it reads. Environment variables, read at import:

    FUSED_RESIDUAL_CACHE    folder of the file, in place of $XDG_CACHE_HOME/fused-residual (by default
                            ~/.cache/fused-residual); "off": choices are kept in memory only
    FUSED_RESIDUAL_TUNING   "on", the default: ways are timed, and of a GEMM's tiles the few that the model ranks
                            first; "full": all of its tiles; "off": nothing is timed and no file is read, the first
                            candidate that runs is taken

Nothing is timed either while `torch.use_deterministic_algorithms` is on, and what was timed before does not count: the
first candidate that runs is taken.

In the file a choice counts for one device name, one version of triton, of torch and of ptxas, and one state of the
files that hold kernels: another device or an update times again. Processes may share the file; the first to finish
timing a key decides for those that come later, so that the ranks of a job agree. Files of the same form in the folder
`choices` beside this module come with the package: they count likewise, after the user's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypedDict

import torch

from ..host.command import settings_are_read
from ..host.files import cache_folder, check_regular, write_atomically
from . import timing
from .timing import Clock, Run

try:
    import fcntl
except ImportError:  # not on Windows, where two processes that write at once may cost one of them its choices
    fcntl = None

_ENVIRONMENTS = 16  # devices times versions that the file keeps, those written last
_MOST_BYTES = 1 << 26  # of a file that is read: one with that many is none of ours, and may be of any size


class Choice(TypedDict):
    """What the file holds for a key."""

    name: str
    milliseconds: dict[str, float]  # median time of each candidate that ran


def hash_kernels(folder: Path) -> str:
    """A hash of the files in `folder` and below that define kernels. What the other files say changes no time."""
    sources = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        text = path.read_bytes()
        if re.search(rb"^@triton\.jit", text, re.MULTILINE):
            sources.update(text)
    return sources.hexdigest()[:12]


def _environment(device: torch.device) -> str:
    """Where a choice in the file counts: the device, the versions and the kernels that it was timed with."""
    return f"{_platform(device)}{_assembler(device)}, kernels {_kernels()}"


@cache
def _platform(device: torch.device) -> str:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {triton}"


@cache
def _kernels() -> str:
    return hash_kernels(Path(__file__).parents[1])


def _assembler(device: torch.device) -> str:
    """The version of ptxas where it compiles. It may change within a process: `TRITON_PTXAS_PATH` names another."""
    if device.type != "cuda" or torch.version.cuda is None:
        return ""
    try:
        from triton import knobs
    except ImportError:
        return ""
    blackwell = torch.cuda.get_device_capability(device) >= (10, 0)
    return f", ptxas {(knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas).version}"


def _parse(content: bytes) -> dict[str, dict[str, Choice]]:
    """The file's content by environment and key; ValueError unless it is what `Choices` writes."""
    if len(content) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    try:
        stored = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None

    def is_choice(choice: object) -> bool:
        return (
            isinstance(choice, dict)
            and choice.keys() == {"name", "milliseconds"}
            and isinstance(choice["name"], str)
            and isinstance(choice["milliseconds"], dict)
            and all(isinstance(time, float | int) for time in choice["milliseconds"].values())
        )

    if not isinstance(stored, dict) or not all(
        isinstance(section, dict) and all(map(is_choice, section.values())) for section in stored.values()
    ):
        raise ValueError("not a table of choices")
    return stored


@cache
def _shipped(folder: Path | None) -> dict[str, dict[str, Choice]]:
    """What the files of choices in `folder` hold, by environment and key."""
    found: dict[str, dict[str, Choice]] = {}
    for path in sorted(folder.glob("*.json")) if folder else ():
        for environment, section in _parse(path.read_bytes()).items():
            found.setdefault(environment, {}).update(section)
    return found


class Choices:
    """Remembered choices: in memory, and in the file at `path` unless that is None.

    What that file does not know is looked up in those of `shipped`, a folder that is only read.

    A file that cannot be read as such is renamed, with a warning. Where it cannot be written, or where a folder, a pipe
    or a device is in its place, which is left alone, one warning is given and the memory goes on without it.
    """

    generation: ClassVar[int] = 0  # while it stays, so do choices, and what was recorded holds no timing of them

    def __init__(self, path: Path | None, timed: bool = True, shipped: Path | None = None):
        self.path = path
        self._folder = shipped
        self._timed = timed
        self._names: dict[tuple[bool, torch.device, tuple], str] = {}  # by (are choices timed?, device, key)
        self._file: dict[str, dict[str, Choice]] | None = None
        self._lock = threading.RLock()  # a candidate may have choices of its own

    def times(self) -> bool:
        """Whether choices are timed now."""
        return self._timed and not torch.are_deterministic_algorithms_enabled()

    def remembered(self, key: tuple, device: torch.device) -> str | None:
        """What this process chose, or None; no file is touched."""
        return self._names.get((self.times(), device, key))

    def choose(self, key: tuple, candidates: Mapping[str, Run], device: torch.device, timed: int | None = None) -> str:
        """The name of the fastest of `candidates` on `device`, or of the first one where nothing can be timed.

        Nothing is timed on the CPU, with timing switched off, or with deterministic algorithms. A candidate that cannot
        run on the device is left out. While a CUDA graph is captured no candidate can be run: what is not known by then
        and would have to be timed is an error, since the graph would keep whatever was taken instead.

        Args:
            key: hashable; everything that the times depend on, the device aside. Its repr is the key in the file.
            timed: how many are timed, the first ones that run; by default all. Any of `candidates` may be remembered.

        Raises:
            RuntimeError: no candidate can run on the device (torch.OutOfMemoryError where memory is why), or a choice
                is still open while a CUDA graph is captured.
        """
        name = self.remembered(key, device)
        return self._choose(key, candidates, device, timed) if name is None else name

    def _choose(self, key: tuple, candidates: Mapping[str, Run], device: torch.device, timed: int | None) -> str:
        with self._lock:
            name = self.remembered(key, device)  # another thread may have been here
            clock = timing.CLOCKS.get(device.type)
            if name is None and clock is None:
                return next(iter(candidates))
            if name is None and self.times():
                name = self._from_file(key, candidates, device)
            if name is None:
                from ..host import launcher  # which needs Triton, as the command of choices does not

                if launcher.is_watched():
                    Choices.generation += 1
                if timing.capturing(device):
                    return self._untimed(key, candidates)
                if self.times() and len(candidates) > 1:
                    launcher.compile_ahead(
                        partial(timing.fails, run, device) for run in islice(candidates.values(), timed)
                    )
                if launcher.compiles_only():  # a choice within a candidate
                    return next(iter(candidates))
                name = self._first_time(key, candidates, device, clock, timed)
            self._names[self.times(), device, key] = name
            return name

    def _untimed(self, key: tuple, candidates: Mapping[str, Run]) -> str:
        """What is taken, and not remembered, where no candidate can be run."""
        if self.times() and len(candidates) > 1:
            raise RuntimeError(
                f"{key}: which of {len(candidates)} candidates is fastest is not known yet, and nothing can be timed "
                "while a CUDA graph is captured: run one step of this shape first, outside of the capture"
            )
        return next(iter(candidates))

    def _first_time(
        self, key: tuple, candidates: Mapping[str, Run], device: torch.device, clock: Clock, timed: int | None
    ) -> str:
        runnable, errors = {}, []
        for name, run in candidates.items():
            error = timing.fails(run, device)
            if error is not None:
                errors.append(error)
            elif not self.times() or len(candidates) == 1:
                return name
            else:
                runnable[name] = run
                if len(runnable) == timed:
                    break
        if not runnable:
            if isinstance(errors[-1], torch.OutOfMemoryError):
                raise errors[-1]
            raise RuntimeError(
                f"{key}: none of {len(candidates)} candidates can run on {_environment(device)}; the last one, "
                f"{list(candidates)[-1]!r}, failed with: {errors[-1]}"
            ) from errors[-1]
        try:
            times = timing.medians(runnable, clock, device)
        except torch.OutOfMemoryError:  # the clock needs memory too, beside a candidate's
            return next(iter(runnable))
        fastest = min(times, key=times.__getitem__)
        if any(isinstance(error, torch.OutOfMemoryError) for error in errors):
            return fastest  # for now: there may be more memory in the next process
        return self._store(key, Choice(name=fastest, milliseconds=times), candidates, device)

    # ---- the file ----

    def entries(self) -> dict[str, dict[str, Choice]]:
        """What the file holds, by environment and key. OSError where it cannot be read."""
        if self.path is None or not self.path.exists():
            return {}
        with _locked(self.path.parent):
            return self._read()

    def clear(self) -> None:
        """Forget everything, in memory and in the file. OSError where that cannot be removed, or is no file."""
        with self._lock:
            Choices.generation += 1
            self._names.clear()
            self._file = None
            if self.path is not None:
                check_regular(self.path)
                self.path.unlink(missing_ok=True)

    def _from_file(self, key: tuple, candidates: Mapping[str, Run], device: torch.device) -> str | None:
        if self._file is None:
            with self._writable():
                self._file = self.entries()
        environment = _environment(device)
        for stored in (self._file or {}, _shipped(self._folder)):
            choice = stored.get(environment, {}).get(repr(key))
            if choice is not None and choice["name"] in candidates:
                return choice["name"]
        return None

    def _store(self, key: tuple, choice: Choice, candidates: Mapping[str, Run], device: torch.device) -> str:
        """Add a choice to the file, unless another process was there before; the name that counts."""
        with self._writable():
            if self.path is None:
                return choice["name"]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent):
                stored = self._read()
                environment = _environment(device)
                section = stored.pop(environment, {})
                earlier = section.get(repr(key))
                if earlier is None or earlier["name"] not in candidates:
                    section[repr(key)] = choice
                stored[environment] = section
                for old in list(stored)[:-_ENVIRONMENTS]:
                    del stored[old]
                content = json.dumps(stored, indent=1).encode()
                write_atomically(self.path, lambda part: part.write(content))
                self._file = stored
                choice = section[repr(key)]
        return choice["name"]

    def _read(self) -> dict[str, dict[str, Choice]]:
        check_regular(self.path)  # a pipe would be waited for
        try:
            with open(self.path, "rb") as file:
                return _parse(file.read(_MOST_BYTES + 1))
        except FileNotFoundError:
            return {}
        except ValueError as error:  # not JSON, not UTF-8, or another content
            aside = self.path.with_suffix(".corrupt")
            check_regular(aside)
            os.replace(self.path, aside)
            warnings.warn(
                f"the remembered choices in {self.path} could not be read ({error}); the file is now {aside}, and what "
                "is needed is timed again",
                RuntimeWarning,
                stacklevel=2,
            )
            return {}

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Inside, where the file system refuses, a warning says so, and choices are kept in memory only."""
        try:
            yield
        except OSError as error:
            warnings.warn(
                f"timed choices cannot be kept in {self.path} ({error}): they are timed again in every process; set "
                'FUSED_RESIDUAL_CACHE to a folder that can be written, or to "off"',
                RuntimeWarning,
                stacklevel=2,
            )
            self.path = None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is here. It has no effect where the file system has no locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# ---- this process's memory ---------------------------------------------------------------------------------------


def tuning_mode(environment: Mapping[str, str]) -> str:
    """What `FUSED_RESIDUAL_TUNING` says; ValueError for anything but "on", "off" and "full"."""
    value = environment.get("FUSED_RESIDUAL_TUNING") or "on"
    if value not in ("on", "off", "full"):
        raise ValueError(f"FUSED_RESIDUAL_TUNING: expected 'on', 'off' or 'full', got {value!r}")
    return value


_folder = cache_folder()
with settings_are_read():
    mode = tuning_mode(os.environ)
process_choices = Choices(
    _folder and _folder / "choices.json", mode != "off", shipped=Path(__file__).with_name("choices")
)
choose, remembered = process_choices.choose, process_choices.remembered
