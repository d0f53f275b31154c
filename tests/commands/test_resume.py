"""--resume: a run that was stopped goes on as if it had not been, and what it cannot go on from is refused."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from resnet.train import main
from resnet.training import ConfigError, TrainConfig, TrainResult, loop, preparation, train
from resnet.training.recipes import RECIPES
from tests.helpers.checkpoints import RunsCode, as_earlier, changed
from tests.helpers.graphs import captures_on_the_cpu
from tests.helpers.runs import load_once, small_runs  # noqa: F401

QUICK = dataclasses.replace(RECIPES["best"], batch_size=8, lr=0.01, resize=33, stem="textbook", average=0.5)
SETTINGS = {
    "textbook": {"recipe": "textbook", "batch_size": 8, "resize": 33, "lr": 0.01, "limit_train": 20},
    "all of a recipe": {"recipe": "quick", "limit_train": 16},
    "the loss scaler": {"recipe": "quick", "limit_train": 4, "batch_size": 2, "dtype": "float16"},
}


@pytest.fixture(autouse=True)
def quick_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "quick", QUICK)


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"impl": "eager", "epochs": 2, "limit_test": 16, "device": "cpu", **changes})


def interrupt_at(monkeypatch, method: str, call: int) -> None:
    """Ctrl-C at one of the calls of a run's method, counted from 1."""
    original = getattr(loop._Run, method)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            monkeypatch.setattr(loop._Run, method, original)
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(loop._Run, method, interrupted)


def figures(result: TrainResult) -> list[tuple[float, float, float]]:
    return [(epoch.loss, epoch.train_acc, epoch.test_acc) for epoch in result.epochs]


def weights(path: str) -> dict[str, torch.Tensor]:
    saved = torch.load(path, weights_only=True)
    nets = {key: saved[key] for key in ("model", "raw_model") if key in saved}
    return {f"{key}: {name}": value for key, net in nets.items() for name, value in net.items()}


def run(path: str, **settings) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """What a run gives, and the weights that it leaves."""
    return train(config(save=path, **settings)), weights(path)


@functools.cache
def unbroken(name: str) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    return run("unbroken.pt", **SETTINGS[name])


def check_that_it_goes_on(monkeypatch, method: str, call: int, settings: dict, uninterrupted: tuple) -> None:
    interrupt_at(monkeypatch, method, call)
    stopped = train(config(save="stopped.pt", **settings))
    assert stopped.interrupted
    resumed, found = run("resumed.pt", resume="stopped.pt", **settings)
    result, expected = uninterrupted
    assert figures(resumed) == figures(result)
    assert [epoch.examples for epoch in resumed.epochs] == [epoch.examples for epoch in result.epochs]
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("method", "call"),
    [("_step", 1), ("_step", 3), ("_accuracy", 1), ("save", 1)],
    ids=["in the first step", "in a later one", "in an evaluation", "while a checkpoint is written"],
)
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(monkeypatch, method, call, settings):
    check_that_it_goes_on(monkeypatch, method, call, SETTINGS[settings], unbroken(settings))


def test_a_resumed_run_replays_a_graph_as_an_unbroken_one_does(monkeypatch):
    captures_on_the_cpu(monkeypatch)
    settings = {**SETTINGS["all of a recipe"], "cuda_graph": "on"}
    check_that_it_goes_on(monkeypatch, "_step", 3, settings, run("unbroken.pt", **settings))


def test_a_run_may_be_stopped_twice_and_save_where_it_came_from(monkeypatch):
    settings = SETTINGS["all of a recipe"]
    interrupt_at(monkeypatch, "_step", 1)
    train(config(save="net.pt", **settings))
    interrupt_at(monkeypatch, "_step", 2)
    train(config(save="net.pt", resume="net.pt", **settings))
    resumed = train(config(save="net.pt", resume="net.pt", **settings))
    assert figures(resumed) == figures(unbroken("all of a recipe")[0])


def test_a_constant_rate_lets_a_finished_run_go_on_for_more_epochs():
    settings = SETTINGS["textbook"]
    longer = train(config(epochs=3, **settings))
    train(config(epochs=2, save="net.pt", **settings))
    assert figures(train(config(epochs=3, resume="net.pt", **settings))) == figures(longer)


def test_a_finished_run_s_figures_come_out_again():
    settings = SETTINGS["textbook"]
    first = train(config(save="net.pt", **settings))
    again = train(config(resume="net.pt", **settings))
    assert again.summary() == first.summary() and not again.interrupted


def test_a_finished_run_s_checkpoint_is_saved_where_that_is_asked_for():
    settings = SETTINGS["all of a recipe"]
    train(config(save="net.pt", **settings))
    again = train(config(resume="net.pt", save="again.pt", **settings))
    assert again.checkpoint == "again.pt"
    expected, found = weights("net.pt"), weights("again.pt")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- what cannot be gone on from -------------------------------------------------------------------------------


def test_a_run_of_an_earlier_version_goes_on():
    train(config(epochs=1, save="net.pt", **SETTINGS["textbook"]))
    changed(Path("net.pt"), Path("net.pt"), as_earlier)
    resumed = train(config(resume="net.pt", **SETTINGS["textbook"]))
    assert figures(resumed) == figures(unbroken("textbook")[0])


@pytest.fixture
def saved() -> dict:
    """A checkpoint's content, in net.pt too."""
    train(config(save="net.pt", epochs=1, **SETTINGS["textbook"]))
    return torch.load("net.pt", weights_only=True)


def refusal(capsys, *arguments: str) -> str:
    settings = {**SETTINGS["textbook"], "impl": "eager", "device": "cpu", "limit_test": 16}
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(SystemExit) as exit:
        main([*words, "--resume", "net.pt", *arguments])
    assert exit.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line.removeprefix("python -m resnet.train: error: --resume: cannot go on from net.pt: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda saved: saved.update(format=2), "a newer version wrote it"),
        (lambda saved: saved.pop("format"), "a version wrote it that kept too little to go on"),
        (lambda saved: saved.pop("args"), "another program wrote it"),
        (lambda saved: saved.update(args=[]), "its settings are none of this version"),
        (lambda saved: saved["model"].pop("7.bias"), "it is of another net"),
        (lambda saved: saved.update(model=[1]), "it is of another net"),
        (lambda saved: saved.update(optimizer=[1]), "it is of another net"),
        (lambda saved: saved["model"].update({"7.bias": torch.zeros(3)}), "it is of another net"),
        (
            lambda saved: saved.update(extra=RunsCode()),
            "it holds more than weights and settings, and what may run code is not read",
        ),
    ],
    ids=[
        "newer",
        "older",
        "another program",
        "no settings",
        "a weight is missing",
        "a list of weights",
        "a list for an optimizer",
        "another size",
        "runs code",
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_that_says_why(capsys, saved, change, reason):
    change(saved)
    torch.save(saved, "net.pt")
    assert refusal(capsys) == reason
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": "1"},
        {"epoch": -1},
        {"epoch": 3},
        {"step": None},
        {"step": -1},
        {"step": 10**6},
        {"tally": None},
        {"tally": []},
        {"tally": {"losses": torch.zeros(2)}},
        {"history": None},
        {"history": [{}]},
        {"history": [dict.fromkeys(("loss", "train_acc", "test_acc", "examples", "seconds"), "x")]},
    ],
    ids=repr,
)
def test_progress_that_no_run_has_made_is_refused(capsys, saved, wrong):
    torch.save(saved | wrong, "net.pt")
    assert refusal(capsys) == "what it says of its run's progress is nothing of this version"


def test_weights_that_are_not_those_that_were_written_are_refused(capsys, saved):
    """A disk or a copy may lose a part of a file, whose size stays; PyTorch does not ask for its sums."""
    with zipfile.ZipFile("net.pt") as file:
        largest = max(file.infolist(), key=lambda each: each.file_size)
    content = bytearray(Path("net.pt").read_bytes())
    middle = largest.header_offset + largest.file_size // 2
    content[middle : middle + 100] = bytes(100)
    Path("net.pt").write_bytes(content)
    assert refusal(capsys) == f"it is damaged: {largest.filename} in it is not what was written"


def test_a_file_that_is_no_checkpoint_is_one_line_that_says_so(capsys, saved):
    whole = Path("net.pt").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"text", pickle.dumps(RunsCode())):
        Path("net.pt").write_bytes(content)
        assert refusal(capsys) == "it is truncated, or no checkpoint", content[:20]
    Path("net.pt").unlink()
    assert refusal(capsys) == "No such file or directory"
    Path("net.pt").mkdir()
    assert refusal(capsys) == "Is a directory"
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch-size", "4", "--seed", "1"], "its run has --batch-size 8, not 4; --seed 0, not 1"),
        (["--recipe", "quick"], "its run has --recipe textbook, not quick; --epochs 1, not 60"),
        (["--impl", "fused"], "its run has --impl eager, not fused"),
        (["--model", "resnet34"], "its run has --model resnet18, not resnet34"),
    ],
    ids=["numbers", "a recipe", "a block", "a net"],
)
def test_settings_that_change_what_is_trained_are_named(capsys, saved, arguments, reason):
    assert refusal(capsys, *arguments) == reason


def test_a_run_that_was_trained_for_longer_is_refused(capsys, monkeypatch):
    """Its figures would be of more epochs than are asked for."""
    train(config(save="net.pt", **SETTINGS["textbook"]))
    assert refusal(capsys, "--epochs", "1") == "its run has 2 epochs and 0 steps, which --epochs 1 is short of"
    interrupt_at(monkeypatch, "_step", 5)
    train(config(save="net.pt", **SETTINGS["textbook"]))
    assert refusal(capsys, "--epochs", "1") == "its run has 1 epochs and 2 steps, which --epochs 1 is short of"


@pytest.mark.parametrize("as_it_was", [True, False], ids=["this version", "an earlier one"])
@pytest.mark.parametrize("images", [24, 8], ids=["more", "fewer"])
def test_another_number_of_images_is_refused(monkeypatch, as_it_was, images):
    """As where the sample now stands in for the whole set: the place in the order of images would mean nothing."""
    rest = {**SETTINGS["textbook"], "limit_train": None}
    whole = load_once(None)

    def first(n):
        of = {"train_images": whole.train_images[:n], "train_labels": whole.train_labels[:n]}
        monkeypatch.setattr(preparation, "load", lambda folder: dataclasses.replace(whole, **of))

    first(16)
    interrupt_at(monkeypatch, "_step", 1)
    train(config(save="net.pt", **rest))
    if not as_it_was:
        changed(Path("net.pt"), Path("net.pt"), lambda saved: saved.pop("train_images"))
    first(images)
    message = f"its run has {16 if as_it_was else 'another number of'} training images, not {images}"
    with pytest.raises(ConfigError, match=message):
        train(config(resume="net.pt", **rest))
