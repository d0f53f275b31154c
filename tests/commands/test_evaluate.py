"""resnet.evaluate: the figures of saved nets, and what is no saved net."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from resnet import evaluate
from resnet.data import CLASSES
from resnet.evaluate import class_figures, class_table, confusion, confusion_table, main
from resnet.training import preparation
from tests.helpers.checkpoints import IMAGES, as_earlier, as_fused, as_small, bad_checkpoints, changed, train_tiny
from tests.helpers.runs import as_typed, load_once


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, as for the training's tests, and the data set read once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(preparation, "load", load_once)
        changes.setattr(evaluate, "load", load_once)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(quick, tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("saved") / "net.pt")


def evaluated(checkpoint: str | Path, *arguments: str, images: int = IMAGES) -> dict:
    words = [str(checkpoint), "--device", "cpu", "--limit-test", str(images), "--json", "figures.json", *arguments]
    assert main(words) == 0
    return json.loads(Path("figures.json").read_text())


def test_the_accuracy_is_that_of_the_training_and_all_is_printed(trained, capsys):
    figures = evaluated(trained.checkpoint)
    assert figures["accuracy"] == trained.test_acc
    assert (figures["images"], figures["right"]) == (IMAGES, round(trained.test_acc * IMAGES))
    assert (figures["model"], figures["impl"], figures["recipe"]) == ("resnet18", "eager", "textbook")
    assert (figures["resize"], figures["epoch"]) == (33, 1)
    matrix = torch.tensor(figures["confusion"])
    assert matrix.sum(1).tolist() == load_once(None).test_labels[:IMAGES].bincount(minlength=10).tolist()
    out = capsys.readouterr().out
    assert out.startswith(f"test acc {trained.test_acc:.3f}: {figures['right']} of {IMAGES} images of ")
    assert class_table(class_figures(matrix)) in out and confusion_table(matrix) in out
    assert [c["name"] for c in figures["classes"]] == list(CLASSES)


def test_a_fused_net_is_evaluated_as_its_eager_twin(trained):
    fused = changed(Path(trained.checkpoint), Path("fused.pt"), as_fused)
    figures = evaluated(fused)
    assert figures["impl"] == "fused"
    assert figures["confusion"] == evaluated(trained.checkpoint)["confusion"]


def test_a_net_of_an_earlier_version_is_evaluated_as_it_was_saved(trained):
    earlier = changed(Path(trained.checkpoint), Path("earlier.pt"), as_earlier)
    assert {**evaluated(earlier), "checkpoint": None} == {**evaluated(trained.checkpoint), "checkpoint": None}


def test_a_deeper_net_is_evaluated_as_it_was_trained():
    trained = train_tiny(Path("deep.pt"), model="resnet50", limit_train=8)
    figures = evaluated("deep.pt")
    assert (figures["model"], figures["impl"]) == ("resnet50", "eager")
    assert figures["accuracy"] == trained.test_acc


def test_the_stem_is_that_of_the_recipe_and_batches_are_as_asked(trained, monkeypatch):
    batches = []
    logits = evaluate.SavedNet.logits
    monkeypatch.setattr(evaluate.SavedNet, "logits", lambda net, xs: logits(net, noted(xs, batches)))
    small = changed(Path(trained.checkpoint), Path("small.pt"), as_small)
    figures = evaluated(small, "--batch-size", "2", "--dtype", "bfloat16", images=3)
    assert (figures["resize"], figures["dtype"], figures["images"]) == (28, "bfloat16", 3)
    assert [tuple(x.shape) for x in batches] == [(2, 1, 28, 28), (1, 1, 28, 28)]


def noted(xs, seen):
    for x in xs:
        seen.append(x)
        yield x


# ---- figures ---------------------------------------------------------------------------------------------------

LABELS, GUESSES = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 0])


def test_the_figures_of_classes_are_those_counted_by_hand():
    matrix = confusion(LABELS, GUESSES, classes=3)
    assert matrix.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert class_table(class_figures(matrix, ("cat", "dog", "emu"))).splitlines() == [
        "class         images   right  accuracy  precision",
        "cat                3       2     0.667      0.667",
        "dog                2       1     0.500      0.500",
        "emu                0       0         -          -",
    ]


def test_the_confusion_matrix_has_its_columns_below_each_other():
    matrix = torch.tensor([[1000, 2], [30, 4]])
    assert confusion_table(matrix, ("cat", "dog")).splitlines() == [
        "                   0     1",
        " 0 cat          1000     2",
        " 1 dog            30     4",
    ]


# ---- the plot --------------------------------------------------------------------------------------------------


def test_the_plot_is_a_picture_of_its_name_s_kind(trained):
    pytest.importorskip("matplotlib")
    evaluated(trained.checkpoint, "--plot", "out.png", images=3)
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_classes_are_drawn_as_they_are():
    """Matplotlib takes what is between two dollars for a formula, which "^" is none."""
    pytest.importorskip("matplotlib")
    from resnet import plots

    labels = torch.tensor([0, 1])
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    plots.evaluation(images, labels, labels, confusion(labels, labels, 2), ("$^$", "b")).savefig(io.BytesIO())


def test_each_image_has_its_class_and_its_guess_and_wrong_ones_are_marked():
    pytest.importorskip("matplotlib")
    from resnet import plots

    images = load_once(None).test_images[:5]
    figure = plots.evaluation(images, LABELS, GUESSES, confusion(LABELS, GUESSES))
    *shown, matrix = figure.axes
    assert [axes.get_title() for axes in shown] == [
        f"{CLASSES[label]}\n{CLASSES[guess]}" for label, guess in zip(LABELS, GUESSES)
    ]
    framed = [axes.spines["top"].get_visible() for axes in shown]
    assert framed == (LABELS != GUESSES).tolist()
    assert sorted(text.get_text() for text in matrix.texts) == ["1", "1", "1", "2"]


# ---- what cannot be used ---------------------------------------------------------------------------------------


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--device", "cpu"])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    *notes, line = err.splitlines()
    assert out == "" and all("using the embedded sample" in note for note in notes)
    return line.removeprefix("python -m resnet.evaluate: error: ")


def test_what_is_no_checkpoint_is_one_line_that_says_why(trained, capsys):
    for path, reason in bad_checkpoints(Path(trained.checkpoint)):
        assert refusal(capsys, path) == f"CHECKPOINT: cannot use {path}: {reason}"
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--limit-test", "0"], "--limit-test: expected at least 1, got 0"),
        (["--limit-test", "10001"], "--limit-test: expected at most "),
        (["--data", "nowhere"], "nowhere: no such folder; expected one with "),
        (["--json", "net.pt"], "--json: expected another file than that of CHECKPOINT, got net.pt"),
        (["--plot", "out.txt"], "--plot: expected a name that ends in one of ."),
        (["--json", "nowhere/a"], "--json: expected a path in an existing folder"),
    ],
    ids=as_typed,
)
def test_an_argument_that_cannot_be_used_is_one_line(trained, capsys, arguments, message):
    Path("net.pt").symlink_to(trained.checkpoint)
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert refusal(capsys, "net.pt", *arguments).startswith(message)


def test_a_plot_without_matplotlib_says_what_to_install(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert refusal(capsys, trained.checkpoint, "--plot", "a.png") == "--plot needs matplotlib: pip install matplotlib"
