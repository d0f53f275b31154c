"""--tensorboard: the scalars of a run, of one that goes on, and what cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from resnet.train import main
from resnet.training import TrainConfig, UnfinishedError, train
from tests.helpers.runs import options, small_runs  # noqa: F401

SETTINGS = {"impl": "eager", "device": "cpu", "batch_size": 4, "limit_train": 8, "limit_test": 4, "resize": 33}


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, "lr": 0.01, **changes})


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(folder).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_scalars_are_the_run_s_figures_and_a_resumed_run_goes_on():
    pytest.importorskip("tensorboard")
    train(config(epochs=1, save="net.pt"))
    train(config(epochs=3, tensorboard="board", log_every=1))  # which begins anew, and has more steps
    train(config(epochs=1, tensorboard="board", log_every=1))
    result = train(config(epochs=2, tensorboard="board", log_every=2, resume="net.pt"))
    found = scalars("board")
    assert found.keys() == {"loss", "accuracy/train", "accuracy/test", "examples per sec", "steps/loss", "steps/lr"}
    for tag, name in {"loss": "loss", "accuracy/train": "train_acc", "accuracy/test": "test_acc"}.items():
        steps, values = zip(*found[tag])
        assert steps == (2, 4) and values == pytest.approx([getattr(epoch, name) for epoch in result.epochs])
    assert found["examples per sec"][1][1] == pytest.approx(8 / result.epochs[1].seconds)
    assert [step for step, _ in found["steps/loss"]] == [1, 2, 4]
    assert [value for _, value in found["steps/lr"]] == pytest.approx([0.01] * 3)


def refusal(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err.removeprefix("python -m resnet.train: error: ")


def test_without_the_package_a_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "--tensorboard needs tensorboard: pip install tensorboard\n"
    assert refusal(capsys, [*options(config()), "--tensorboard", "board"]) == message
    assert not Path("board").exists()


@pytest.mark.parametrize("folder", ["", "file", "nowhere/board", "file/board"])
def test_a_folder_that_cannot_be_is_one_line_before_any_work(capsys, folder):
    pytest.importorskip("tensorboard")
    Path("file").touch()
    message = f"--tensorboard: expected a folder that may be written, or a new one's name, got {folder}\n"
    assert refusal(capsys, [*options(config()), "--tensorboard", folder]) == message


@pytest.mark.parametrize("option", ["--save", "--log"])
def test_a_file_of_the_same_name_is_one_line_before_any_work(capsys, option):
    """Neither is there yet; after the first epoch the second of them could not be made."""
    pytest.importorskip("tensorboard")
    message = f"--tensorboard: expected another path than that of {option}, got board\n"
    assert refusal(capsys, [*options(config()), "--tensorboard", "board", option, "./board"]) == message


def test_a_folder_that_takes_no_more_is_one_line_and_the_weights_are_kept():
    pytest.importorskip("tensorboard")
    settings = config(epochs=1, tensorboard="board", save="net.pt")
    Path("board").touch()  # after the check of the settings
    with pytest.raises(UnfinishedError, match=r"^board: cannot be written \(.*\); the weights are in net.pt$"):
        train(settings)
