"""resnet.curves: several runs in one picture, a line for each, and what is no run refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from resnet import plots
from resnet.curves import main, named

EPOCHS = [{"loss": 0.9, "train_acc": 0.5, "test_acc": 0.61}, {"loss": 0.4, "train_acc": 0.7, "test_acc": 0.6}]


def write(path: str, epochs: object = EPOCHS) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"epochs": epochs}))
    return path


def test_runs_are_drawn_in_one_picture_and_said_in_a_line_each(capsys):
    assert main([write("eager.json"), write("fused.json", EPOCHS[:1]), "--out", "both.png"]) == 0
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == (
        "eager: 2 epochs, loss 0.400, train acc 0.700, test acc 0.6000; the highest test acc is 0.6100, of epoch 1\n"
        "fused: 1 epochs, loss 0.900, train acc 0.500, test acc 0.6100; the highest test acc is 0.6100, of epoch 1\n"
    )


def test_each_run_has_its_colour_for_loss_and_for_both_accuracies():
    loss, accuracy = plots.runs({"a": EPOCHS, "b": EPOCHS[:1]}).axes
    assert [curve.get_label() for curve in loss.lines] == ["a", "b"]
    assert [list(curve.get_ydata()) for curve in loss.lines] == [[0.9, 0.4], [0.9]]
    assert [list(curve.get_ydata()) for curve in accuracy.lines] == [[0.5, 0.7], [0.61, 0.6], [0.5], [0.61]]
    colours = [curve.get_color() for curve in accuracy.lines]
    assert colours[0] == colours[1] == loss.lines[0].get_color() != colours[2] == colours[3]


def test_the_legends_have_each_name_as_it_is():
    """Matplotlib leaves out a label that starts with _, and takes what is between two dollars for a formula."""
    names = ["_old", "$^$", "a"]
    figure = plots.runs(dict.fromkeys(names, EPOCHS))
    figure.savefig(io.BytesIO())
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == names


def test_names_are_as_long_as_tells_the_files_apart():
    assert list(named([write("a/run.json"), write("b/run.json")])) == ["a/run", "b/run"]
    assert list(named([write("a/one.json"), write("b/two.json")])) == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.json"], "absent.json: cannot be read (No such file or directory)"),
        (["text.json"], "text.json: expected what python -m resnet.train --json writes"),
        (["list.json"], "list.json: expected what python -m resnet.train --json writes"),
        (["other.json"], "other.json: expected what python -m resnet.train --json writes"),
        (["/"], "/: cannot be read (Is a directory)"),
        (["none.json"], "none.json: its run has no whole epoch"),
        (["run.json", "./run.json"], "RUN: expected files of different names"),
        (["run.json", "--out", "curves.txt"], "--out: expected a name that ends in one of "),
        (["picture.png", "--out", "picture.png"], "--out: expected another file than that of RUN picture.png"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_leaves_no_picture(capsys, arguments, message):
    for name, content in (("text.json", "{"), ("list.json", "[]"), ("other.json", '{"epochs": [{}]}')):
        Path(name).write_text(content)
    write("none.json", [])
    write("run.json")
    write("picture.png")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not Path("curves.png").exists()
