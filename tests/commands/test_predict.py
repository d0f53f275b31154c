"""resnet.predict: files become the data set's images, and a saved net names them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet.data import CLASSES, FASHION_MNIST, Batches
from resnet.predict import image_for, main, most_likely
from resnet.training.checkpoints import read_net
from tests.helpers.checkpoints import as_earlier, as_fused, changed, save_untrained
from tests.helpers.runs import load_once

Image = pytest.importorskip("PIL.Image", reason="Pillow, which reads images, is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("saved") / "net.pt")


def image_of_the_set(number: int) -> torch.Tensor:
    return load_once(None).test_images[number]


def save(pixels, path: str, **options) -> str:
    Image.fromarray(np.asarray(pixels)).save(path, **options)
    return path


# ---- the command -----------------------------------------------------------------------------------------------


def test_each_file_is_a_line_with_what_the_net_finds_most_likely(checkpoint, capsys):
    saved = read_net(str(changed(checkpoint, Path("fused.pt"), as_fused)), torch.device("cpu"))
    images = load_once(None).test_images[:2]
    batches = Batches(images, torch.zeros(2, dtype=torch.int64), 2, device="cpu", resize=33)
    expected = saved.logits(x for x, _ in batches).softmax(1)
    paths = [save(image, f"{name}.png") for name, image in zip("ab", images)]
    changed(checkpoint, Path("earlier.pt"), as_earlier)
    for net in (str(checkpoint), "fused.pt", "earlier.pt"):
        assert main([net, *paths, "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"a.png: {most_likely(expected[0])}\nb.png: {most_likely(expected[1])}\n"


def test_sizes_kinds_and_names_may_differ(checkpoint, capsys):
    large = save(np.zeros((60, 90, 3), np.uint8), "large.jpg")
    odd = save(image_of_the_set(0), "a\nb.png")
    assert main([str(checkpoint), large, odd, "--invert", "--device", "cpu"]) == 0
    classes = "|".join(CLASSES)
    three = rf"(?:(?:{classes}) [01]\.\d{{3}}(?:, )?){{3}}"
    assert re.fullmatch(rf"large\.jpg: {three}\na\\nb\.png: {three}\n", capsys.readouterr().out)


def test_the_most_likely_come_first():
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    assert most_likely(probabilities, ("ant", "bee", "cat", "dog")) == "bee 0.600, dog 0.250, ant 0.100"


# ---- images ----------------------------------------------------------------------------------------------------


def test_an_image_of_the_set_is_read_as_it_is():
    expected = image_of_the_set(3)
    assert torch.equal(image_for(FASHION_MNIST, save(expected, "a.png")), expected)
    assert torch.equal(image_for(FASHION_MNIST, save(255 - expected, "a.png"), invert=True), expected)
    in_colour = expected[:, :, None].expand(-1, -1, 3)
    assert torch.equal(image_for(FASHION_MNIST, save(in_colour, "a.png")), expected)


def test_sixteen_bits_keep_their_highest():
    expected = image_of_the_set(3)
    assert torch.equal(image_for(FASHION_MNIST, save(expected.numpy().astype(np.uint16) * 256, "a.png")), expected)


@pytest.mark.parametrize("invert", [False, True])
def test_what_is_transparent_is_ground(invert):
    pixels = np.full((28, 28, 4), 128, np.uint8)
    pixels[:, :, 3] = 255
    pixels[:9] = (*[200] * 3, 0)
    found = image_for(FASHION_MNIST, save(pixels, "a.png"), invert)
    assert (found[:9] == 0).all() and (found[9:] == (127 if invert else 128)).all()


def test_proportions_are_kept_and_what_is_beside_is_ground():
    found = image_for(FASHION_MNIST, save(np.full((100, 50), 255, np.uint8), "a.png"))
    assert (found[:, 7:21] == 255).all() and (found[:, :7] == 0).all() and (found[:, 21:] == 0).all()


@pytest.mark.parametrize("shape", [(1, 100), (3000, 1)])
def test_a_line_is_a_line_of_pixels_and_not_nothing(shape):
    found = image_for(FASHION_MNIST, save(np.full(shape, 255, np.uint8), "a.png"))
    assert (found == 255).sum() == 28 and {*found.unique().tolist()} == {0, 255}


def test_a_photograph_stands_as_its_camera_says():
    upright = np.zeros((32, 32), np.uint8)
    upright[:16] = 255
    orientation = Image.Exif()
    orientation[0x0112] = 3  # upside down
    found = image_for(FASHION_MNIST, save(upright, "a.jpg", exif=orientation)).float()
    assert found[:12].mean() < 10 and found[16:].mean() > 245


# ---- what cannot be used ---------------------------------------------------------------------------------------


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--device", "cpu"])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("python -m resnet.predict: error: ").rstrip("\n")


def test_a_file_that_is_no_image_is_one_line_that_says_which(checkpoint, capsys, monkeypatch):
    good = save(np.tile(image_of_the_set(0), (9, 9)), "good.png")
    whole = Path(good).read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "text": b"text", "empty": b""}.items():
        Path(name).write_bytes(content)
    save(image_of_the_set(0), "a.gif")
    Path("folder").mkdir()
    for path, reason in {
        "cut": "it is damaged",
        "text": "it is no PNG or JPEG image",
        "empty": "it is no PNG or JPEG image",
        "a.gif": "it is no PNG or JPEG image",
        "folder": "Is a directory",
        "nowhere.png": "No such file or directory",
    }.items():
        assert refusal(capsys, str(checkpoint), good, path) == f"IMAGE: cannot use {path}: {reason}"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert refusal(capsys, str(checkpoint), good) == "IMAGE: cannot use good.png: it has too many pixels"


def test_a_checkpoint_that_is_none_is_one_line(capsys):
    good = save(image_of_the_set(0), "good.png")
    assert refusal(capsys, good, good) == "CHECKPOINT: cannot use good.png: it is truncated, or no checkpoint"


def test_without_pillow_a_line_says_what_to_install(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refusal(capsys, str(checkpoint), "a.png") == "IMAGE: reading images needs Pillow: pip install pillow"
