"""resnet.data: where Fashion-MNIST is found, that only the genuine files are taken, and what the batches hold.

The faults are planted in copies of the embedded sample, read as if it were the whole set: the code is the same, and
the tests need neither the network nor the 70,000 images. Tests of the whole set are skipped where it is absent.
"""

from __future__ import annotations

import gzip
import http.server
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet.data import Batches, DatasetError, fetch, files, load


def whole_set_folder() -> Path | None:
    named = os.environ.get("FASHION_MNIST_DIR")
    folders = (Path(named) if named else None, files.DEBIAN_FOLDER, files.download_folder(), Path("data"))
    return next((f.absolute() for f in folders if f and all(file.find(f) for file in files._WHOLE_SET)), None)


WHOLE_SET_FOLDER = whole_set_folder()


@pytest.fixture(scope="module")
def whole_set():
    if WHOLE_SET_FOLDER is None:
        pytest.skip("the whole of Fashion-MNIST is not on this machine")
    return load(WHOLE_SET_FOLDER)


@pytest.fixture(autouse=True)
def nothing_around(tmp_path, monkeypatch):
    """An empty current folder and cache, no Debian package; conftest.py sees to it that there is no network."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("FUSED_RESIDUAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setattr(files, "DEBIAN_FOLDER", tmp_path / "debian")


@pytest.fixture
def small_set(monkeypatch):
    """The sample's files stand for the whole set."""
    monkeypatch.setattr(files, "_WHOLE_SET", files._SAMPLE)


def place(folder: Path) -> Path:
    """A copy of the sample's four files in `folder`."""
    folder.mkdir(parents=True)
    for name in NAMES:
        shutil.copyfile(files._SAMPLE_FOLDER / name, folder / name)
    return folder


def content(file: files._IdxFile) -> bytes:
    return gzip.decompress((files._SAMPLE_FOLDER / f"{file.name}.gz").read_bytes())


TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = files._SAMPLE
NAMES = [f"{file.name}.gz" for file in files._SAMPLE]


# ---- where it is looked for ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_set")
def test_the_first_place_in_order_is_taken(tmp_path, monkeypatch, capsys):
    cache, debian, here, named, given = (
        place(p)
        for p in (files.download_folder(), files.DEBIAN_FOLDER, Path("data"), tmp_path / "named", tmp_path / "given")
    )
    monkeypatch.setenv("FASHION_MNIST_DIR", str(named))
    assert load(given).source == str(given)
    assert load().source == str(named)
    monkeypatch.delenv("FASHION_MNIST_DIR")
    for folder in (here, debian, cache):
        assert load().source == str(folder)
        shutil.rmtree(folder)
    assert load(download=False).source == files.EMBEDDED_SAMPLE
    assert "embedded sample" in capsys.readouterr().err


def test_the_sample_is_the_last_resort_and_one_line_says_so(capsys):
    sample = load()
    assert sample.source == "embedded sample"
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert "embedded sample of 2,048 training and 512 test images" in printed[0]
    assert "nor to be downloaded (<urlopen error [Errno " in printed[0], "the line says why there was no download"


@pytest.mark.usefixtures("small_set")
def test_a_found_set_prints_nothing(tmp_path, capfd):
    load(place(tmp_path / "given"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("small_set")
def test_a_searched_place_without_all_files_is_passed_over():
    (place(Path("data")) / f"{TEST_LABELS.name}.gz").unlink()
    assert load(download=False).source == files.EMBEDDED_SAMPLE


@pytest.mark.usefixtures("small_set")
@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("file", files._SAMPLE, ids=lambda f: f.name)
def test_a_named_folder_without_a_file_is_an_error_that_names_it(tmp_path, monkeypatch, by, file):
    place(Path("data"))  # which must not step in
    folder = place(tmp_path / "named")
    (folder / f"{file.name}.gz").unlink()
    monkeypatch.setenv("FASHION_MNIST_DIR", str(folder) if by == "environment" else "")
    with pytest.raises(DatasetError) as error:
        load(folder if by == "argument" else None)
    assert str(folder / file.name) in str(error.value)
    assert file.sha256 in str(error.value)


def test_a_named_folder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere: no such folder; expected one with train-images-idx3-ubyte"):
        load(tmp_path / "nowhere")


# ---- what is taken for genuine ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_set")
@pytest.mark.parametrize("form", ["plain", "gzip level 1", "several gzip members"])
def test_the_checksum_does_not_depend_on_compression(tmp_path, form):
    expected = load(place(tmp_path / "as_packed"))
    folder = tmp_path / "other"
    folder.mkdir()
    for file in files._SAMPLE:
        raw = content(file)
        if form == "plain":
            (folder / file.name).write_bytes(raw)
        elif form == "gzip level 1":
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(raw, 1))
        else:
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(raw[:100]) + gzip.compress(raw[100:]))
    loaded = load(folder)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(loaded, name), getattr(expected, name))


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def halfway_flipped(raw: bytes) -> bytes:
    return flipped(raw, len(raw) // 2)


FAULTS = {
    # name: (of the plain bytes, of the .gz bytes), what the error says
    "an empty plain file": (lambda raw: (b"", None), "wrong size"),
    "a truncated plain file": (lambda raw: (raw[:-1], None), "wrong size"),
    "a plain file with a byte too many": (lambda raw: (raw + b"\0", None), "wrong size"),
    "a wrong magic number": (lambda raw: (b"\0\0\x0d" + raw[3:], None), "wrong magic number 0x00000d"),
    "another number of axes": (lambda raw: (flipped(raw, 3), None), "wrong magic number"),
    "another length in the header": (lambda raw: (flipped(raw, 7), None), "wrong checksum"),
    "one bit of a plain file": (lambda raw: (halfway_flipped(raw), None), "wrong checksum"),
    "one bit, recompressed": (lambda raw: (None, gzip.compress(halfway_flipped(raw))), "wrong checksum"),
    "a truncated gzip file": (lambda raw: (None, gzip.compress(raw)[:-9]), "truncated or corrupted gzip"),
    "a gzip file without its trailer": (lambda raw: (None, gzip.compress(raw)[:-8]), "truncated or corrupted gzip"),
    "one bit of a gzip file": (
        lambda raw: (None, halfway_flipped(gzip.compress(raw))),
        "gzip file|wrong (size|checksum)",
    ),
    "an empty gzip file": (lambda raw: (None, b""), "wrong size"),
    "a web page": (lambda raw: (None, b"<html>Sign in</html>"), "truncated or corrupted gzip"),
    "a plain file named .gz": (lambda raw: (None, raw), "truncated or corrupted gzip"),
}


@pytest.mark.usefixtures("small_set")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", [TRAIN_IMAGES, TEST_LABELS], ids=lambda f: f.name)
def test_a_file_that_is_not_genuine_is_an_error_that_names_it(tmp_path, fault, file):
    folder = place(tmp_path / "given")
    broken, message = FAULTS[fault]
    plain, packed = broken(content(file))
    path = folder / (file.name if plain is not None else f"{file.name}.gz")
    path.write_bytes(plain if plain is not None else packed)
    with pytest.raises(DatasetError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(f"{path}: ")
    assert f"expected Fashion-MNIST's {file.name}" in str(error.value)


@pytest.mark.usefixtures("small_set")
@pytest.mark.parametrize("where", ["environment", "./data", "Debian's folder", "cache"])
def test_a_corrupted_file_is_an_error_wherever_it_is_found(tmp_path, monkeypatch, where):
    folder = {
        "environment": tmp_path / "named",
        "./data": Path("data"),
        "Debian's folder": files.DEBIAN_FOLDER,
        "cache": files.download_folder(),
    }[where]
    path = place(folder) / f"{TRAIN_LABELS.name}.gz"
    path.write_bytes(gzip.compress(flipped(content(TRAIN_LABELS), 1000)))
    if where == "environment":
        monkeypatch.setenv("FASHION_MNIST_DIR", str(folder))
    with pytest.raises(DatasetError) as error:
        load()
    assert str(error.value).startswith(f"{path}: wrong checksum")


@pytest.mark.usefixtures("small_set")
def test_a_file_that_cannot_be_opened_is_an_error_that_names_it(tmp_path, monkeypatch):
    path = place(tmp_path / "given") / f"{TRAIN_LABELS.name}.gz"

    def refuse(name, *args):
        if Path(name) == path:
            raise PermissionError(13, "Permission denied", name)
        return gzip.GzipFile(name, *args)

    monkeypatch.setattr(files.gzip, "open", refuse)  # by hand, since root may open anything
    with pytest.raises(DatasetError, match=r"train-labels-idx1-ubyte\.gz: cannot be read .*Permission denied"):
        load(path.parent)


# ---- the download ----------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves the sample's files, or what a test puts in their place."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.instead: dict[str, bytes] = {}  # by name
        self.stop_after: dict[str, int] = {}  # bytes, then the connection closes
        self.halfway = lambda: None  # called between the halves of each file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/fashion/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        path = files._SAMPLE_FOLDER / name
        body = self.server.instead.get(name) or (path.read_bytes() if path.is_file() else None)
        if body is None or not self.path.startswith("/fashion/"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if name in self.server.stop_after:
            self.wfile.write(body[: self.server.stop_after[name]])
            return None
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.server.halfway()
        self.wfile.write(body[len(body) // 2 :])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def loopback():
    """Skips the test where even 127.0.0.1 cannot be reached: in a sandbox whose network is off."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        try:
            socket.create_connection(listening.getsockname()).close()
        except OSError as error:
            pytest.skip(f"the loopback network is off ({error})")


@pytest.fixture
def server(loopback, small_set, monkeypatch):
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("FASHION_MNIST_URL", running.url)
        monkeypatch.setattr(files, "_OPEN_SECONDS", 60.0)  # a busy machine is no silent server
        yield running
        running.shutdown()


def test_a_download_fills_the_cache_with_a_progress_bar_and_is_made_once(server, capfd):
    assert load().source == str(files.download_folder())
    bars = capfd.readouterr().err
    for file in files._SAMPLE:
        assert f"{file.name}: 100%" in bars
    assert server.asked == NAMES
    assert load().source == str(files.download_folder())
    assert server.asked == NAMES, "the second load asked the server again"
    assert sorted(p.name for p in files.download_folder().iterdir()) == sorted(NAMES)


def test_no_download_where_none_is_wanted(server):
    assert load(download=False).source == files.EMBEDDED_SAMPLE
    assert server.asked == []


def test_a_partial_file_never_looks_whole(server):
    whole, partial = [], []

    def look():
        deadline = time.monotonic() + 60
        while not (parts := list(files.download_folder().glob(".*.part*"))) and time.monotonic() < deadline:
            time.sleep(0.01)  # the client may still be reading the headers
        whole.append({p.name for p in files.download_folder().iterdir()} & set(NAMES))
        partial.append(len(parts))

    server.halfway = look
    load()
    assert whole == [set(NAMES[:done]) for done in range(4)]
    assert partial == [1, 1, 1, 1]


def test_a_broken_connection_leaves_no_partial_file_and_the_sample_is_used(server, capsys):
    server.stop_after[NAMES[2]] = 1000
    assert load().source == files.EMBEDDED_SAMPLE
    assert "connection closed after 1000 of" in capsys.readouterr().err
    assert sorted(p.name for p in files.download_folder().iterdir()) == sorted(NAMES[:2])
    server.stop_after.clear()
    server.asked.clear()
    assert load().source == str(files.download_folder())
    assert server.asked == NAMES[2:], "what was whole is not fetched again"


def test_ctrl_c_during_a_download_leaves_no_partial_file(server, monkeypatch):
    class Interrupted(files.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert list(files.download_folder().iterdir()) == []


@pytest.mark.parametrize("body", [b"<html>Sign in</html>", gzip.compress(b"another file")], ids=["page", "other"])
def test_what_a_server_sends_in_place_of_a_file_is_an_error_that_names_it(server, body):
    server.instead[NAMES[0]] = body
    with pytest.raises(DatasetError) as error:
        load()
    assert str(error.value).startswith(server.url + NAMES[0])
    assert list(files.download_folder().iterdir()) == []


def test_a_missing_file_on_the_server_is_the_sample_with_the_reason(server, monkeypatch, capsys):
    monkeypatch.setenv("FASHION_MNIST_URL", server.url.replace("fashion", "elsewhere"))
    assert load().source == files.EMBEDDED_SAMPLE
    assert "404" in capsys.readouterr().err


def test_a_server_that_never_answers_is_given_up(loopback, small_set, monkeypatch, capsys):
    monkeypatch.setattr(files, "_OPEN_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("FASHION_MNIST_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert load().source == files.EMBEDDED_SAMPLE
    assert "no answer from" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["fashion-mnist", "http://localhost:port/"])
def test_an_address_that_is_none_is_an_error_that_names_it(tmp_path, url):
    with pytest.raises(DatasetError, match=f"^{url.rstrip('/')}/train-images-idx3-ubyte.gz: not an address"):
        fetch(tmp_path, url)


# ---- the sample and the whole set ------------------------------------------------------------------------------


def test_the_sample_is_drawn_evenly_from_the_ten_classes():
    sample = load()
    assert sample.train_images.shape == (2048, 28, 28)
    assert sample.test_images.shape == (512, 28, 28)
    assert sample.train_images.dtype == sample.test_images.dtype == torch.uint8
    assert sample.train_labels.dtype == sample.test_labels.dtype == torch.int64
    assert set(sample.train_labels.bincount(minlength=10).tolist()) == {204, 205}
    assert set(sample.test_labels.bincount(minlength=10).tolist()) == {51, 52}


def test_a_damaged_sample_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    folder = place(tmp_path / "sample")
    (folder / NAMES[1]).write_bytes(gzip.compress(flipped(content(TRAIN_LABELS), 100)))
    monkeypatch.setattr(files, "_SAMPLE_FOLDER", folder)
    with pytest.raises(DatasetError, match=r"sample/train-labels-idx1-ubyte\.gz: wrong checksum"):
        load(download=False)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_sample_is_the_first_images_of_each_class_of_the_whole_set(whole_set, part):
    sample = load()
    images, labels = getattr(sample, f"{part}_images"), getattr(sample, f"{part}_labels")
    all_images, all_labels = getattr(whole_set, f"{part}_images"), getattr(whole_set, f"{part}_labels")
    each, more = divmod(len(labels), 10)
    firsts = [(all_labels == c).nonzero().flatten()[: each + (c < more)] for c in range(10)]
    index = torch.cat(firsts).sort().values
    assert torch.equal(images, all_images[index])
    assert torch.equal(labels, all_labels[index])


def test_the_whole_set_has_its_published_sizes_and_classes(whole_set):
    assert whole_set.train_images.shape == (60000, 28, 28)
    assert whole_set.test_images.shape == (10000, 28, 28)
    assert whole_set.train_labels.bincount().tolist() == [6000] * 10
    assert whole_set.test_labels.bincount().tolist() == [1000] * 10
    assert whole_set.source == str(WHOLE_SET_FOLDER)


# ---- batches ---------------------------------------------------------------------------------------------------

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def numbered(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n images of one grey each, label i of image i."""
    labels = torch.arange(n)
    return labels.to(torch.uint8).view(n, 1, 1).expand(n, 28, 28).contiguous(), labels


def order_of(batches: Batches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement with pixels as areas and edges repeated, one axis after the other."""
    n = len(image)
    at = ((np.arange(size) + 0.5) * n / size - 0.5).clip(0, n - 1)
    rows = np.stack([np.interp(at, np.arange(n), row) for row in image])
    return np.stack([np.interp(at, np.arange(n), column) for column in rows.T]).T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resize", [28, 32, 45, 96])
def test_images_are_the_bytes_by_255_enlarged_bilinearly(device, resize):
    sample = load()
    images, labels = sample.train_images[:5], sample.train_labels[:5]
    ((x, y),) = Batches(images, labels, 8, device=device, resize=resize)
    expected = np.stack([bilinear(image / 255, resize) for image in images.numpy()])[:, None]
    np.testing.assert_allclose(x.cpu().numpy(), expected, rtol=0, atol=1e-5)
    assert y.tolist() == labels.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
def test_batches_have_the_type_format_and_device_asked_for(device, dtype, memory_format):
    images, labels = numbered(6)
    batches = Batches(
        images, labels.to(torch.uint8), 4, device=device, resize=32, dtype=dtype, memory_format=memory_format
    )
    strides = (1024, 1, 32, 1) if memory_format is torch.channels_last else (1024, 1024, 32, 1)
    for x, y in batches:
        assert x.shape[1:] == (1, 32, 32)
        assert x.dtype == dtype
        assert x.stride() == strides
        assert y.dtype == torch.int64
        assert x.device.type == y.device.type == device
    assert batches.images.dtype == torch.uint8
    assert batches.images.device.type == device


@pytest.mark.parametrize(
    ("n", "batch_size", "drop_last", "sizes"),
    [
        (10, 4, False, [4, 4, 2]),
        (10, 4, True, [4, 4]),
        (8, 4, False, [4, 4]),
        (8, 4, True, [4, 4]),
        (3, 4, False, [3]),
        (3, 4, True, []),
        (0, 4, False, []),
    ],
)
def test_the_last_batch_is_smaller_or_left_out(n, batch_size, drop_last, sizes):
    batches = Batches(*numbered(n), batch_size, device="cpu", resize=28, drop_last=drop_last)
    assert [len(y) for _, y in batches] == sizes
    assert len(batches) == len(sizes)
    assert batches.examples == sum(sizes)


def test_without_shuffling_the_order_is_that_of_the_set():
    batches = Batches(*numbered(10), 4, device="cpu", resize=28)
    assert order_of(batches) == order_of(batches) == list(range(10))


@pytest.mark.parametrize("device", DEVICES)
def test_a_shuffled_epoch_has_each_image_once_with_its_label(device):
    batches = Batches(*numbered(100), 32, device=device, resize=28, shuffle=True)
    seen = []
    for x, y in batches:
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
        seen += y.tolist()
    assert sorted(seen) == list(range(100))
    assert seen != list(range(100))


@pytest.mark.parametrize("device", DEVICES)
def test_the_order_is_a_function_of_seed_and_epoch_alone(device):
    def epochs(seed, where=device):
        batches = Batches(*numbered(100), 32, device=where, resize=28, shuffle=True, seed=seed)
        return [order_of(batches) for _ in range(3)]

    first = epochs(0)
    torch.manual_seed(99)
    assert epochs(0) == first
    assert epochs(0, "cpu") == first
    second = epochs(1)
    assert len({tuple(order) for order in first + second}) == 6, "(seed, epoch + 1) is not (seed + 1, epoch)"


def test_an_epoch_can_be_set():
    batches = Batches(*numbered(50), 50, device="cpu", resize=28, shuffle=True)
    orders = [order_of(batches) for _ in range(3)]
    batches.epoch = 1
    assert order_of(batches) == orders[1]


def test_shuffling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    order_of(Batches(*numbered(10), 4, device="cpu", resize=28, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


IMAGES, LABELS = numbered(4)


@pytest.mark.parametrize(
    ("argument", "images", "labels", "options"),
    [
        ("images", IMAGES.float(), LABELS, {}),
        ("images", IMAGES.unsqueeze(1), LABELS, {}),
        ("images", IMAGES[:, :20], LABELS, {}),
        ("labels", IMAGES, LABELS[:3], {}),
        ("labels", IMAGES, LABELS.float(), {}),
        ("batch_size", IMAGES, LABELS, {"batch_size": 0}),
        ("resize", IMAGES, LABELS, {"resize": 27}),
        ("dtype", IMAGES, LABELS, {"dtype": torch.int32}),
        ("seed", IMAGES, LABELS, {"seed": -1}),
        ("memory_format", IMAGES, LABELS, {"memory_format": torch.preserve_format}),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(argument, images, labels, options):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        Batches(images, labels, **{"batch_size": 2, "device": "cpu", **options})
