"""What commands share that run nets: settings that are refused, the device, the files that they write."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor, nn

from resnet.backends import implementation
from resnet.kernels.host.command import ConfigError, RunError
from resnet.kernels.host.files import irregular, write_atomically
from resnet.ranks import ALONE, Ranks

if TYPE_CHECKING:  # which the commands do without, unless a plot is asked for
    from matplotlib.figure import Figure

LARGEST = 2**63 - 1  # that PyTorch takes for a size
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of autocast

_WRITTEN_TO = ("pipe", "character device")  # not replaced by a file


class OutputError(RunError, OSError):
    """A file could not be written; the message names it."""


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got}")


def find_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device that --device names: "auto" is the current GPU where there is one. ConfigError where it is absent.

    Of several processes each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    require(device.type == "cuda", "--device", "auto, cpu, cuda or cuda:N", name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(count > 0, "--device", "auto or cpu, since PyTorch finds no CUDA device here", name)
    if ranks.size > 1:
        require(device.index is None, "--device", "auto, cpu or cuda: each process has a GPU of its own", name)
        most = f"at most {count} on this machine, one for each of its CUDA devices, or --device cpu"
        require(ranks.local_size <= count, "processes", most, ranks.local_size)
        return torch.device("cuda", ranks.local_rank)
    index = torch.cuda.current_device() if device.index is None else device.index
    require(index < count, "--device", f"one of the {count} devices, cuda:0 to cuda:{count - 1}", name)
    return torch.device("cuda", index)


def check_backend(impl: str, device: torch.device) -> None:
    """ConfigError where a fused net cannot run on the device, with the backend in force; others need none."""
    if impl != "fused":
        return
    try:
        implementation(torch.empty(0, device=device))
    except RuntimeError as error:
        raise ConfigError(str(error)) from error


def require_count(name: str, value: int) -> None:
    """ConfigError unless the value is a size from 1 on."""
    require(1 <= value <= LARGEST, name, "at least 1" if value < 1 else "at most 2**63 - 1", value)


def require_limit(name: str, limit: int | None, images: int, source: str) -> None:
    """ConfigError unless there are so many images; None is no limit."""
    require(limit is None or limit >= 1, name, "at least 1", limit)
    require(limit is None or limit <= images, name, f"at most {images} with {source}", limit)


def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    """What the net gives; in transformers the logits are a part of that. ConfigError where there are none."""
    out = net(x)
    out = out if isinstance(out, Tensor) else getattr(out, "logits", out)
    require(isinstance(out, Tensor), "MODEL", "a net that gives a tensor", type(out).__name__)
    return out


def maker(spec: str, expected: str = "module:callable") -> Callable[[], object]:
    """The callable whose module and name MODEL is; ConfigError where there is none, or it needs arguments.

    A class of transformers is called with its default configuration.
    """
    module, _, name = spec.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"MODEL: expected {expected}, got {spec} ({error})") from error
    configuration = getattr(make, "config_class", None)
    arguments = () if configuration is None else (configuration(),)
    try:
        with contextlib.suppress(ValueError):  # a built-in function may not say what it takes
            inspect.signature(make).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"MODEL: expected a callable that needs no arguments, got {spec} ({error})") from error
    return partial(make, *arguments)


def made_by(spec: str, expected: str = "module:callable") -> nn.Module:
    """The net that the callable gives, whose module and name MODEL is; ConfigError where there is none."""
    net = maker(spec, expected)()
    require(isinstance(net, nn.Module), "MODEL", "a callable that gives an nn.Module", type(net).__name__)
    return net


# ---- files that a user has named ---------------------------------------------------------------------------------


Paths = Mapping[str, "str | os.PathLike[str] | None"]


def check_outputs(outputs: Paths, inputs: Paths | None = None) -> None:
    """ConfigError unless `write_output` can write at each path, and no two of them are one file. None is no output.

    Nor may an output be one of the inputs, which it would replace.
    """
    given = {name: Path(path) for name, path in outputs.items() if path is not None}
    read = {name: Path(path) for name, path in (inputs or {}).items() if path is not None}
    for name, path in given.items():
        _check_writable(name, path)
    for (first, path), (name, other) in combinations(given.items(), 2):
        require(not _are_one(path, other), name, f"another file than that of {first}", other)
    for (first, source), (name, path) in product(read.items(), given.items()):
        require(not _is_there_as(source, path), name, f"another file than that of {first}", path)


def _check_writable(name: str, path: Path) -> None:
    try:
        kind = irregular(path)
        folder = Path(os.path.realpath(path)).parent
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: expected a file's path, got {path} ({reason})") from None
    if standard_stream(path) is not None:
        return
    if kind in _WRITTEN_TO:
        require(os.access(path, os.W_OK), name, "a file that may be written", f"the {kind} {path}")
        return
    require(folder.is_dir(), name, "a path in an existing folder", f"{path}; {folder} is no folder")
    require(kind is None, name, "a file's path", f"the {kind} {path}")
    require(os.access(folder, os.W_OK), name, "a path in a folder that may be written", path)


def _are_one(path: Path, other: Path) -> bool:
    """Whether what is written to one replaces, or is mixed with, what was written to the other."""
    try:
        return os.path.samefile(path, other) and irregular(path) != "character device"
    except FileNotFoundError:
        return os.path.realpath(path) == os.path.realpath(other)


def _is_there_as(source: Path, path: Path) -> bool:
    """Whether an input is there, and is the file that the path names."""
    try:
        return os.path.samefile(source, path)
    except (OSError, ValueError):  # what cannot be read is refused by what reads it
        return False


def standard_stream(path: Path) -> int | None:
    """The descriptor of standard output or error where the path is the file that it goes to, as /dev/stdout is."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(stream), os.stat(path)):
                return stream
    return None


def write_output(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that a user has named; OutputError where that fails.

    A regular file is replaced, whole or not at all, and through a link the one that it names. A pipe and a character
    device are written to, and likewise the file that standard output or error goes to, from where it has come.
    """
    path = Path(path)
    try:
        file = _open_as_it_is(path)
        if file is None:
            write_atomically(path, lambda file: file.write(content))
            return
    except OSError as error:
        raise not_written(path, error) from error
    with file:
        append_to(file, path, content)


def open_output(path: str | os.PathLike[str], append: bool) -> BinaryIO:
    """A file that a user has named, for `append_to`; OutputError where it cannot be opened.

    As `write_output` it follows links, and writes into a pipe, a device, and where standard output or error goes to.
    """
    path = Path(path)
    try:
        return _open_as_it_is(path) or open(path, "ab" if append else "wb", buffering=0)
    except OSError as error:
        raise not_written(path, error) from error


def _open_as_it_is(path: Path) -> BinaryIO | None:
    """What is written to and never replaced, without a buffer; None for another path."""
    stream = standard_stream(path)
    if stream is not None:
        sys.stdout.flush()
        return open(stream, "wb", buffering=0, closefd=False)
    if irregular(path) in _WRITTEN_TO:
        return open(os.open(path, os.O_WRONLY), "wb", buffering=0)  # by hand: it must not be made where it is gone
    return None


def append_to(file: BinaryIO, path: str | os.PathLike[str], content: bytes) -> None:
    """Write to a file of `open_output`, where readers find it at once; OutputError where that fails."""
    try:
        while content:  # a write into what has no buffer may take a part
            content = content[file.write(content) :]
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """The error for a file or a folder that a user has named."""
    return OutputError(f"{path}: cannot be written ({error.strerror or error})")


def check_tensorboard(folder: str | os.PathLike[str] | None, outputs: Paths) -> None:
    """ConfigError where TensorBoard's package is missing, or the folder cannot have its files. None is no folder.

    Nor may it be one of the outputs, which are files.
    """
    if folder is None:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ConfigError("--tensorboard needs tensorboard: pip install tensorboard") from None
    place = Path(folder) if os.path.exists(folder) else Path(folder).absolute().parent
    usable = str(folder) != "" and place.is_dir() and os.access(place, os.W_OK)  # "" is TensorBoard's own choice
    require(usable, "--tensorboard", "a folder that may be written, or a new one's name", folder)
    for name, path in outputs.items():
        differs = path is None or os.path.realpath(path) != os.path.realpath(folder)
        require(differs, "--tensorboard", f"another path than that of {name}", folder)


# ---- plots -------------------------------------------------------------------------------------------------------


def check_plot(path: str | os.PathLike[str] | None, name: str = "--plot") -> None:
    """ConfigError where matplotlib is missing or draws no file of such a name. None is no plot."""
    if path is None:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ConfigError(f"{name} needs matplotlib: pip install matplotlib") from None
    formats = sorted({*FigureCanvasAgg.get_supported_filetypes()} - {"pgf"})  # which LaTeX draws
    require(_kind(path) in formats, name, f"a name that ends in one of .{', .'.join(formats)}", path)


def write_plot(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure as its path's end says; OutputError where that fails."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=_kind(path))
    write_output(path, picture.getvalue())


def _kind(path: str | os.PathLike[str]) -> str:
    return Path(path).suffix[1:].lower()
