"""Fashion-MNIST's files: found or downloaded, and checked by SHA-256.

The data set is Zalando Research's (https://github.com/zalandoresearch/fashion-mnist, MIT licence). `load` finds or
downloads it and falls back on a small sample of it that comes with this package.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import queue
import struct
import sys
import threading
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from resnet.data.images import holds_images, read_folder
from resnet.data.sets import IMAGE_SIZE, DatasetError, ImageSet
from resnet.kernels.host.files import cache_folder, write_atomically

OFFICIAL_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's and Ubuntu's package dataset-fashion-mnist
EMBEDDED_SAMPLE = "embedded sample"

_OPEN_SECONDS = 5.0  # until a server has answered: an offline user should reach the sample soon
_STALL_SECONDS = 15.0  # without a byte, once a download runs
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class _IdxFile:
    """One IDX file of unsigned bytes, in full: big-endian magic number and axes, then the values."""

    name: str
    shape: tuple[int, ...]
    sha256: str  # of the uncompressed bytes: distributions recompress the files, so a .gz has no one checksum

    @property
    def header(self) -> bytes:
        return struct.pack(f">{1 + len(self.shape)}I", 0x800 | len(self.shape), *self.shape)

    @property
    def size(self) -> int:
        return len(self.header) + math.prod(self.shape)

    def find(self, folder: Path) -> Path | None:
        """The file in `folder`, plain or else gzipped; None where there is neither."""
        return next((p for p in (folder / self.name, folder / f"{self.name}.gz") if os.path.isfile(p)), None)

    def read(self, path: Path | BinaryIO, origin: str | None = None) -> np.ndarray:
        """The uint8 array of `shape` in a file, named or, gzipped, open. DatasetError unless every byte is as expected.

        `origin` is what an error calls the file, where that is not its path.
        """
        name = origin or str(path)
        try:
            # One byte more than expected shows a file that is too long, without unpacking all of what it may hold.
            # By name and not by content: a .gz whose first bytes are damaged is to be called a damaged gzip file.
            with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as f:
                content = f.read(self.size + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DatasetError(f"{name}: truncated or corrupted gzip file ({error}); {self._expected}") from error
        except OSError as error:
            raise DatasetError(f"{name}: cannot be read ({error}); {self._expected}") from error
        if not self.header.startswith(content[:4]):
            found, wanted = content[:4].hex(), self.header[:4].hex()
            raise DatasetError(f"{name}: wrong magic number 0x{found}, expected 0x{wanted}; {self._expected}")
        if len(content) != self.size:
            found = "more" if len(content) > self.size else f"only {len(content)}"
            raise DatasetError(f"{name}: wrong size, expected {self.size} bytes, found {found}; {self._expected}")
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise DatasetError(f"{name}: wrong checksum, SHA-256 is {digest}; {self._expected}")
        # A copy, since torch wants memory that it may write to.
        return np.frombuffer(content, np.uint8, offset=len(self.header)).reshape(self.shape).copy()

    @property
    def _expected(self) -> str:
        return (
            f"expected Fashion-MNIST's {self.name}, plain or .gz, {self.size} bytes uncompressed with SHA-256 "
            f"{self.sha256}"
        )


# In the order of ImageSet's fields.
_WHOLE_SET = (
    _IdxFile(
        "train-images-idx3-ubyte",
        (60000, IMAGE_SIZE, IMAGE_SIZE),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    _IdxFile("train-labels-idx1-ubyte", (60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    _IdxFile(
        "t10k-images-idx3-ubyte",
        (10000, IMAGE_SIZE, IMAGE_SIZE),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    _IdxFile("t10k-labels-idx1-ubyte", (10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
)

# The sample holds the first images of each class, of the training and of the test set, in their order there: as many of
# each class as the size allows. Where ten does not divide the size, the first classes have one more.
_SAMPLE_FOLDER = Path(__file__).parent / "fashion_mnist_sample"
_SAMPLE = (
    _IdxFile(
        "train-images-idx3-ubyte",
        (2048, IMAGE_SIZE, IMAGE_SIZE),
        "da10d27dce6ad2d5f4d6fd0dd725d0c430c09b53f9056820fead14ea9726b991",
    ),
    _IdxFile("train-labels-idx1-ubyte", (2048,), "d7c233723b69c5983a7bb349ad3484199d460e60bee37cc20e3f180e6a991bfc"),
    _IdxFile(
        "t10k-images-idx3-ubyte",
        (512, IMAGE_SIZE, IMAGE_SIZE),
        "bf16859de772eac3fa7a8c7b60a033c86044c5152b42df292f436ea31b039deb",
    ),
    _IdxFile("t10k-labels-idx1-ubyte", (512,), "aff0ec27ea28c6cceedf87d423d192919ba76c05b7d2f751afd23aa0bad7f617"),
)


def load(folder: str | os.PathLike[str] | None = None, *, download: bool = True) -> ImageSet:
    """Fashion-MNIST from the first of: `folder`, the folder that the environment variable `FASHION_MNIST_DIR` names,
    `./data`, the folder of Debian's package `dataset-fashion-mnist`, the per-user cache (`FUSED_RESIDUAL_CACHE`), a
    download into it, and last, with a printed line that says so, the sample of 2,048 + 512 images that comes with the
    package.

    A folder holds the four IDX files under their official names, plain or gzipped. Their content is checked by size
    and SHA-256 wherever it comes from. `folder` may also be one of images, which `read_folder` reads: it is taken for
    one where it has train, test or val in it, and none of the four files.

    Args:
        folder: where the files are; nothing else is then tried.
        download: whether to try the network, at the dataset's official address or, where the environment variable
            `FASHION_MNIST_URL` is set, at that of a mirror.

    Raises:
        DatasetError: a file is missing from the folder that was named, or a file found or downloaded is not genuine.
        ConfigError: the folder is one of images, and Pillow is missing.
    """
    if folder is not None and _has_no_idx_file(path := Path(os.path.expanduser(folder))):
        if not holds_images(path):
            raise DatasetError(
                f"{path}: no data set in it; expected {', '.join(f.name for f in _WHOLE_SET)}[.gz], or train/ and "
                "test/ (or val/) with a folder of images per class"
            )
        return read_folder(path)
    named = folder if folder is not None else os.environ.get("FASHION_MNIST_DIR") or None
    if named is not None:
        return _read_folder(Path(os.path.expanduser(named)), _WHOLE_SET)  # "~nobody" stays as it is

    cache = download_folder()
    places = [Path("data"), DEBIAN_FOLDER, *([cache] if cache else [])]
    for place in places:
        if all(file.find(place) for file in _WHOLE_SET):
            return _read_folder(place, _WHOLE_SET)

    *names, last = ("./data" if place == Path("data") else str(place) for place in places)
    missing = f"not in {', '.join(names)} or {last}"
    if download and cache is not None:
        try:
            fetch(cache, os.environ.get("FASHION_MNIST_URL") or OFFICIAL_URL)
            return _read_folder(cache, _WHOLE_SET)
        except (OSError, http.client.HTTPException) as error:
            missing += f", nor to be downloaded ({error or type(error).__name__})"
    sample = _read_folder(_SAMPLE_FOLDER, _SAMPLE, source=EMBEDDED_SAMPLE)
    print(
        f"Fashion-MNIST is {missing}: using the embedded sample of {len(sample.train_images):,} training and "
        f"{len(sample.test_images):,} test images; FASHION_MNIST_DIR may name a folder with the whole set.",
        file=sys.stderr,
    )
    return sample


def _has_no_idx_file(folder: Path) -> bool:
    return os.path.isdir(folder) and not any(file.find(folder) for file in _WHOLE_SET)


def download_folder() -> Path | None:
    """Where a download is kept: in the package's cache; None where that is off."""
    cache = cache_folder()
    return None if cache is None else cache / "fashion-mnist"


def fetch(folder: str | os.PathLike[str], url: str = OFFICIAL_URL) -> None:
    """Downloads into `folder` those of the four gzipped files that it lacks, each with a progress bar.

    A file appears under its name only when it is whole and its checksum is right.

    Args:
        folder: made where it does not exist.
        url: address of the folder that holds the files.

    Raises:
        OSError, http.client.HTTPException: no connection, a broken one, or a folder that cannot be written.
        DatasetError: what the server sent is not the genuine file, or `url` is not an address.
    """
    folder = Path(folder)
    for file in _WHOLE_SET:
        if file.find(folder) is None:
            _fetch_file(file, folder, f"{url.rstrip('/')}/{file.name}.gz")


def _fetch_file(file: _IdxFile, folder: Path, url: str) -> None:
    with _open(url) as response:

        def download(part: BinaryIO) -> None:
            _copy(response, part, file.name)
            part.seek(0)
            try:
                file.read(part, origin=url)
            except DatasetError as error:
                raise DatasetError(
                    f"{error}. A proxy may have answered in the server's place: fetch the four files by other means "
                    "and name their folder in FASHION_MNIST_DIR."
                ) from error

        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{file.name}.gz", download)


def _open(url: str) -> http.client.HTTPResponse:
    """`urlopen` that has an answer within `_OPEN_SECONDS` or raises TimeoutError.

    urlopen's own time-out bounds neither the look-up of the name nor the number of addresses that are tried in turn.
    So it runs in a thread that need not be waited for.
    """
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(urllib.request.urlopen(url, timeout=_STALL_SECONDS))
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = answer.get(timeout=_OPEN_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer from {url} within {_OPEN_SECONDS:g} seconds") from None
    if isinstance(result, (ValueError, http.client.InvalidURL)):
        raise DatasetError(f"{url}: not an address to download from ({result}); see FASHION_MNIST_URL") from result
    if isinstance(result, Exception):
        raise result
    return result


def _copy(response: http.client.HTTPResponse, out: BinaryIO, name: str) -> None:
    length = response.headers.get("Content-Length")
    total = int(length) if length and length.isdecimal() else None
    received = 0
    with tqdm(desc=name, total=total, unit="B", unit_scale=True) as bar:
        while chunk := response.read(_CHUNK_BYTES):
            out.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    if total is not None and received != total:  # http.client takes a connection that closes early for the end
        raise ConnectionError(f"connection closed after {received} of {total} bytes of {name}")


def _read_folder(folder: Path, files: tuple[_IdxFile, ...], source: str | None = None) -> ImageSet:
    if not os.path.isdir(folder):  # which a name that is too long is not either
        raise DatasetError(f"{folder}: no such folder; expected one with {', '.join(f.name for f in files)}[.gz]")
    paths = [file.find(folder) for file in files]
    for file, path in zip(files, paths):
        if path is None:
            raise DatasetError(f"{folder / file.name}[.gz]: no such file; {file._expected}")
    arrays = [torch.from_numpy(file.read(path)) for file, path in zip(files, paths)]
    train_images, train_labels, test_images, test_labels = arrays
    return ImageSet(train_images, train_labels.long(), test_images, test_labels.long(), source or str(folder))
