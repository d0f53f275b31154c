"""--data with a folder of images per class: what is read, that the commands work with it, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare
from resnet import evaluate, predict, train
from resnet.data import Augmentation, Batches, DatasetError, ImageSpec, load
from resnet.kernels.host.command import ConfigError
from tests.helpers.checkpoints import changed
from tests.helpers.runs import load_once

Image = pytest.importorskip("PIL.Image", reason="Pillow, which reads images, is not installed")

CLASSES = ("ankle boot", "bag", "coat that has a long name")
SIZE = 32
COMMANDS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}


def pixels(number: int, colour: bool) -> np.ndarray:
    image = np.pad(load_once(None).train_images[number].numpy(), 2)
    return np.stack([image, image // 2, image // 4], axis=-1) if colour else image


def make(folder: Path, colour: bool, test: str = "test", classes: tuple[str, ...] = CLASSES, size: int = SIZE) -> Path:
    """Of each class four images to train on, and two to test."""
    number = 0
    for part, count in (("train", 4), (test, 2)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for place in range(count):
                Image.fromarray(pixels(number, colour)[:size, :size]).save(folder / part / name / f"{place}.png")
                number += 1
    return folder


# ---- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("colour", "test"), [(True, "test"), (False, "val")])
def test_images_and_labels_are_those_of_the_files_and_classes_take_turns(colour, test):
    found = load(make(Path("set"), colour, test))
    assert found.spec == ImageSpec(CLASSES, 3 if colour else 1, SIZE) and found.source == "set"
    assert found.train_labels.tolist() == [0, 1, 2] * 4 and found.test_labels.tolist() == [0, 1, 2] * 2
    first_of_each = [pixels(number, colour) for number in (0, 4, 8)]
    assert np.array_equal(found.train_images[:3], np.stack(first_of_each))
    assert np.array_equal(found.test_images[-1], pixels(17, colour))


def test_one_image_in_colour_makes_the_set_so():
    folder = make(Path("set"), colour=False)
    Image.fromarray(pixels(0, colour=True)).save(folder / "test" / "bag" / "0.png")
    found = load(folder)
    assert found.spec.channels == 3
    assert np.array_equal(found.train_images[0], np.stack(3 * [pixels(0, False)], axis=-1))


def test_hidden_files_are_passed_over_jpeg_is_read_and_test_may_lack_a_class():
    folder = make(Path("set"), colour=False)
    (folder / "train" / ".DS_Store").write_text("a system's own")
    (folder / "train" / "bag" / ".DS_Store").write_text("a system's own")
    Image.fromarray(pixels(0, False)).save(folder / "train" / "bag" / "z.JPEG")
    for path in (folder / "test" / "bag").iterdir():
        path.unlink()
    (folder / "test" / "bag").rmdir()
    found = load(folder)
    assert found.train_labels.bincount().tolist() == [4, 5, 4] and found.test_labels.bincount().tolist() == [2, 0, 2]


def test_each_channel_of_a_batch_is_as_a_grey_image_s_augmented_or_not():
    found = load(make(Path("set"), colour=True))
    for augmentation in (None, Augmentation(shift=2, flip=True, erase=8)):
        settings = {"device": "cpu", "resize": 40, "shuffle": True, "augmentation": augmentation}
        in_colour, _ = next(iter(Batches(found.train_images, found.train_labels, 12, **settings)))
        assert in_colour.shape == (12, 3, 40, 40) and in_colour.is_contiguous(memory_format=torch.channels_last)
        for channel in range(3):
            grey, _ = next(iter(Batches(found.train_images[..., channel], found.train_labels, 12, **settings)))
            torch.testing.assert_close(in_colour[:, channel : channel + 1], grey, check_stride=False)


# ---- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("images") / "set", colour=True)


def settings(folder: Path, **changes: str) -> list[str]:
    chosen = {"impl": "fused", "device": "cpu", "epochs": "1", "batch-size": "6", "resize": "33", "lr": "0.01"}
    return [word for name, value in {**chosen, "data": str(folder), **changes}.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def checkpoint(folder) -> str:
    path = str(folder.parent / "net.pt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests
    assert train.main(settings(folder, save=path)) == 0
    torch.set_num_threads(threads)
    return path


def test_a_checkpoint_knows_its_images_and_the_commands_use_them(folder, checkpoint, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["images"] == {"classes": CLASSES, "channels": 3, "size": SIZE}
    assert saved["model"]["7.weight"].shape == (3, 512) and saved["model"]["0.0.weight"].shape[1] == 3
    words = [checkpoint, "--data", str(folder), "--device", "cpu", "--json", "figures.json"]
    assert evaluate.main(words) == 0
    figures = json.loads(Path("figures.json").read_text())
    assert figures["accuracy"] == saved["history"][-1]["test_acc"]
    assert [each["name"] for each in figures["classes"]] == list(CLASSES) and len(figures["confusion"]) == 3
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(" 0 ankle boot ") and len(first) == len(second) == len(third)

    image = str(folder / "test" / "bag" / "0.png")
    assert predict.main([checkpoint, image, "--device", "cpu"]) == 0
    named = capsys.readouterr().out.removeprefix(f"{image}: ").rstrip("\n").split(", ")
    assert sorted(text.rpartition(" ")[0] for text in named) == list(CLASSES)


def test_a_run_goes_on_with_the_same_images_and_no_others(folder, checkpoint, capsys):
    assert train.main(settings(folder, resume=checkpoint, epochs="2")) == 0
    other = make(Path("other"), colour=True, classes=("a", "b"))
    assert refusal(capsys, "train", *settings(other, resume=checkpoint)) == (
        f"--resume: cannot go on from {checkpoint}: its run has colour images of 32x32 in 3 classes "
        f"({', '.join(CLASSES)}), not colour images of 32x32 in 2 classes (a, b)"
    )


def test_the_plot_has_the_folder_s_classes_and_colours(folder):
    pytest.importorskip("matplotlib")
    from resnet import plots

    found = load(folder)
    labels = found.test_labels
    matrix = evaluate.confusion(labels, labels, len(CLASSES))
    *shown, table = plots.evaluation(found.test_images, labels, labels, matrix, CLASSES).axes
    assert [axes.get_title().split("\n")[0] for axes in shown] == [CLASSES[label] for label in labels]
    assert [label.get_text() for label in table.get_yticklabels()] == list(CLASSES)


# ---- what cannot be used -----------------------------------------------------------------------------------------


def refusal(capsys, command: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        COMMANDS[command](list(arguments))
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" or command == "train"
    return err.splitlines()[-1].removeprefix(f"python -m resnet.{command}: error: ")


def test_other_images_than_the_net_s_are_one_line(folder, checkpoint, capsys):
    spec = f"colour images of 32x32 in 3 classes ({', '.join(CLASSES)})"
    message = refusal(capsys, "evaluate", checkpoint, "--device", "cpu")
    assert message.startswith(f"--data: expected {spec}, as the net was trained on, got grey images of 28x28 in 10 ")
    message = refusal(capsys, "train", *settings(folder, resize="28"))
    assert (
        message == f"--resize: expected at least 32, the size of the images of {folder}: they are enlarged only, got 28"
    )


def test_images_of_which_a_recipe_would_leave_nothing_are_one_line(capsys):
    """An image of 8x8 would be one grey level, whatever is in it."""
    small = make(Path("small"), colour=False, size=8)
    message = refusal(capsys, "train", *settings(small, recipe="best", epochs="4"))
    assert message == "--recipe best: expected images larger than the 8x8 pixels that it erases of each, got 8x8"


def test_the_benchmarks_are_of_fashion_mnist_alone(folder, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--data", str(folder), "--device", "cpu", "--batch-size", "2"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: --data: expected a folder of Fashion-MNIST's four IDX files, got {folder}")


@pytest.mark.parametrize(
    "images",
    [[], {"classes": []}, {"classes": [1, 2]}, {"channels": 2}, {"size": 0}, {"size": 34}, {"size": "large"}],
    ids=str,
)
def test_what_a_checkpoint_says_of_its_images_is_checked(folder, checkpoint, capsys, images):
    def change(saved):
        saved["images"] = {**saved["images"], **images} if isinstance(images, dict) else images

    path = str(changed(Path(checkpoint), Path("other.pt"), change))
    reason = f"{path}: what it says of its images is nothing of this version"
    assert refusal(capsys, "evaluate", path, "--device", "cpu") == f"CHECKPOINT: cannot use {reason}"
    assert refusal(capsys, "train", *settings(folder, resume=path)) == f"--resume: cannot go on from {reason}"


def no_image(folder: Path) -> None:
    (folder / "train" / "bag" / "notes.txt").write_text("none")


def cut(folder: Path) -> None:
    path = folder / "test" / "bag" / "0.png"
    path.write_bytes(path.read_bytes()[:100])


def save(shape: tuple[int, ...], name: str) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(np.zeros(shape, np.uint8)).save(folder / name)


def remove(name: str) -> Callable[[Path], object]:
    def remove_all(folder: Path) -> None:
        for path in sorted((folder / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    return remove_all


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image": (no_image, "train/bag/notes.txt: it is no PNG or JPEG image; expected a PNG or JPEG image"),
    "a damaged image": (cut, "test/bag/0.png: it is damaged; expected a PNG or JPEG image"),
    "another size": (
        save((32, 40), "test/bag/z.png"),
        "test/bag/z.png: 40x32 pixels; expected 32x32, as set/train/ankle boot/0.png has",
    ),
    "no square": (
        save((32, 40), "train/ankle boot/0.png"),
        "train/ankle boot/0.png: 40x32 pixels; expected a square image",
    ),
    "a folder in a class": (
        lambda folder: (folder / "train" / "bag" / "more").mkdir(),
        "train/bag/more: Is a directory; expected a PNG or JPEG image",
    ),
    "an empty class": (remove("train/bag"), "train/bag: an empty class; expected PNG or JPEG images in it"),
    "a class of test alone": (
        lambda folder: (folder / "test" / "bag").rename(folder / "test" / "bags"),
        f"test/bags: no class of train; expected one of {', '.join(CLASSES)}",
    ),
    "a file for a class": (
        lambda folder: (folder / "train" / "a.csv").touch(),
        "train/a.csv: cannot be read (Not a directory); expected train/<class>/<image>.png or .jpg, ",
    ),
    "no classes": (remove("train"), "train: expected two classes or more, got 0; expected train/<class>/"),
    "no classes to test": (remove("test"), "test: no classes; expected train/<class>/"),
    "no test": (
        lambda folder: (folder / "test").rename(folder / "tests"),
        "test: cannot be read (No such file or directory); expected train/<class>/",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_as_it_has_to_be_is_one_line_that_names_the_file(fault):
    change, message = FAULTS[fault]
    folder = make(Path("set"), colour=False)
    change(folder)
    with pytest.raises(DatasetError) as error:
        load(folder)
    assert str(error.value).startswith(f"set/{message}") and "\n" not in str(error.value)


def test_a_folder_without_any_data_set_says_what_may_be_in_it(capsys):
    Path("empty").mkdir()
    assert refusal(capsys, "train", "--data", "empty", "--device", "cpu").startswith(
        "empty: no data set in it; expected train-images-idx3-ubyte, "
    )


def test_the_four_files_go_before_images():
    folder = make(Path("set"), colour=False)
    (folder / "train-images-idx3-ubyte").touch()
    with pytest.raises(DatasetError, match=r"^set/train-labels-idx1-ubyte\[.gz\]: no such file"):
        load(folder)


def test_without_pillow_a_line_says_what_to_install(monkeypatch):
    Path("set/train").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"^--data: reading images needs Pillow: pip install pillow$"):
        load("set")
