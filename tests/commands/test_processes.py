"""resnet.train under torchrun: two processes on the CPU train as one does, and end as one does."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from resnet.commands import find_device
from resnet.data import Batches
from resnet.kernels.host.command import ConfigError
from resnet.ranks import ALONE, Ranks
from resnet.train import main
from resnet.training import TrainConfig, preparation
from tests.helpers.runs import command, load_once, options, small_runs  # noqa: F401

PROCESSES = 2
# 18 images in batches of 8: the last one has 2, one for each process, which maps of 2x2 pixels allow.
SMALL = {"epochs": 2, "batch_size": 8, "resize": 33, "limit_train": 18, "limit_test": 9, "device": "cpu"}


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


def torchrun(config: TrainConfig, *more: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "-m", "--"]
    return command(config, *more, launcher=launcher)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a run; an assertion where it hangs."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def figures_of(path: str) -> dict:
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize(
    "rest",
    [{"limit_train": 33, "resize": 64}, {"recipe": "best", "limit_train": 66, "resize": 28}],
    ids=["plain", "best"],
)
def test_with_statistics_of_the_whole_batch_two_processes_learn_what_one_does(rest):
    """Of each batch the one has 17 images and the other one 16. With statistics of their own they differ by half."""
    settings = config(epochs=1, batch_size=33, lr=1e-4, seed=3, save="net.pt", json="figures.json", **rest)
    first = dict(preparation.net_of("resnet18", "fused", settings.seed, settings.stem).named_parameters())
    found, figures = [], []
    for run in (lambda: main(options(settings)), lambda: ended(torchrun(settings, "--sync-batch-norm"))[0]):
        assert run() == 0
        saved = torch.load("net.pt", weights_only=True)
        weights = saved.get("raw_model", saved["model"])
        found.append(torch.cat([(weights[name] - first[name].detach()).flatten() for name in first]))
        figures.append(figures_of("figures.json"))
    one, two = found
    assert (two - one).norm() < 0.03 * one.norm()
    assert [f["processes"] for f in figures] == [1, 2]
    assert figures[1]["loss"] == pytest.approx(figures[0]["loss"], rel=1e-3)
    assert figures[1]["epochs"][0]["examples"] == figures[0]["epochs"][0]["examples"]


def test_two_processes_say_once_what_one_says():
    status, out, err = ended(torchrun(config(json="figures.json", log="log")))
    assert status == 0, err
    figures = figures_of("figures.json")
    assert re.fullmatch(
        rf"loss {figures['loss']:.3f}, train acc {figures['train_acc']:.3f}, test acc {figures['test_acc']:.3f}\n"
        rf"\d+\.\d examples/sec on 2 processes \(cpu\)\n",
        out,
    )
    assert err.count("epoch     loss") == 1
    assert len(Path("log").read_text().splitlines()) == 2


def test_two_processes_go_on_as_if_they_had_not_stopped_and_one_does_not(capsys):
    eager = functools.partial(config, impl="eager")
    for settings in (eager(save="whole.pt"), eager(save="part.pt", epochs=1)):
        status, _, err = ended(torchrun(settings))
        assert status == 0, err
    with pytest.raises(SystemExit):
        main(options(eager(resume="part.pt")))
    assert "its run has 2 processes, not 1" in capsys.readouterr().err
    status, _, err = ended(torchrun(eager(save="part.pt", resume="part.pt")))
    assert status == 0, err
    whole, part = (torch.load(name, weights_only=True) for name in ("whole.pt", "part.pt"))
    assert all(torch.equal(part["model"][name], value) for name, value in whole["model"].items())
    assert [e["loss"] for e in part["history"]] == [e["loss"] for e in whole["history"]]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_one_checkpoint_of_a_step_that_all_have_ended(name):
    process = torchrun(config(save="net.pt", json="figures.json", log="log", log_every=1, epochs=10**6))
    while not (os.path.exists("log") and Path("log").read_text().count("\n") > 3) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    status, _, err = ended(process)
    assert status != 0
    assert err.count("interrupted after ") == 1
    saved, figures = torch.load("net.pt", weights_only=True), figures_of("figures.json")
    assert figures["interrupted"]
    assert figures["signal"] == name
    assert saved["processes"] == PROCESSES
    assert sorted(os.listdir()) == ["figures.json", "log", "net.pt"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["--data", "nowhere"], "nowhere"),
        (["--lr", "1e30"], "non-finite"),
    ],
)
def test_what_fails_in_all_processes_is_one_line(words, expected):
    status, out, err = ended(torchrun(config(), *words))
    assert (status, out) == (1, "")  # torchrun's own
    said = [line for line in err.splitlines() if line.startswith("python -m resnet.train: error: ")]
    assert len(said) == 1
    assert expected in said[0]
    assert "resnet/train.py" not in err  # no traceback


def test_a_file_that_cannot_be_written_ends_all_processes_and_the_weights_are_kept():
    status, _, err = ended(torchrun(config(log="/dev/full", save="net.pt")))
    assert status == 1
    said = [line for line in err.splitlines() if line.startswith("python -m resnet.train: error: ")]
    assert said == [
        "python -m resnet.train: error: /dev/full: cannot be written (No space left on device); "
        "the weights are in net.pt"
    ]
    assert torch.load("net.pt", weights_only=True)["epoch"] == 1


# ---- a process's place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resize", "each"), [(33, 1), (32, 2)], ids=["2x2 pixels at the end", "one pixel at the end"])
def test_a_batch_has_an_image_for_each_process_or_as_many_as_batchnorm_needs(capsys, resize, each):
    def batches(batch_size: int) -> Batches:
        settings = config(resize=resize, batch_size=batch_size, limit_train=3 * each + 1)
        return preparation.batches_of(settings, load_once(None), torch.device("cpu"), Ranks(0, 2))[0]

    with pytest.raises(ConfigError, match=rf"--batch-size: expected {2 * each} images or more, {each} for each of 2"):
        batches(2 * each - 1)
    assert batches(3 * each).examples == 3 * each
    left_out = f"1 of {3 * each + 1} images are left out of each epoch: too few for 2 processes.\n"
    assert capsys.readouterr().err.endswith(left_out)


PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "1"}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Ranks(5, 8, 1, 4)),
    ],
)
def test_a_process_knows_its_place_from_what_torchrun_says(monkeypatch, said, expected):
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert Ranks.of_environment() == expected


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "b")])
def test_what_is_no_place_is_refused(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=rf"environment: expected a process's place.*RANK={rank} WORLD_SIZE={size}"):
        Ranks.of_environment()


def test_each_process_has_a_gpu_of_its_own_or_is_told_that_there_are_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert find_device(name, Ranks(5, 8, 1, 2)) == torch.device("cuda", 1)
    assert find_device("cpu", Ranks(2, 3, 2, 3)) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"processes: expected at most 2 on this machine, .* or --device cpu, got 3"):
        find_device("auto", Ranks(0, 3, 0, 3))
    with pytest.raises(ConfigError, match=r"--device: expected auto, cpu or cuda: each process .* got cuda:1"):
        find_device("cuda:1", Ranks(0, 2, 0, 2))


def test_a_group_of_the_caller_that_has_a_gpu_s_backend_alone_is_refused(tmp_path):
    """As `init_process_group("nccl")` makes it. What they agree on lies on the CPU: no GPU is waited for."""
    for backend, fits in (("gloo", True), ("cuda:gloo", False)):
        dist.init_process_group(backend, init_method=f"file://{tmp_path}/{fits}", rank=0, world_size=1)
        refused = nullcontext() if fits else pytest.raises(ConfigError, match=r"process group: .* got cuda:gloo")
        try:
            with refused, Ranks(0, 2).joined(torch.device("cpu")):
                pass
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(("images", "size"), [(8, 2), (7, 2), (5, 4), (3, 4)])
def test_the_shares_of_a_batch_are_all_of_it_in_order_and_differ_by_one_image(images, size):
    index = torch.arange(images) + 10
    shares = [Ranks(rank, size).share(index) for rank in range(size)]
    assert torch.cat(shares).equal(index)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
