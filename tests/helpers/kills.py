"""Training that is killed again and again, as a power cut would end it: `python -m tests.helpers.kills 50`.

A killed process runs no handler and ends no write, so that what it leaves shows whether files are replaced whole.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from resnet.training import TrainConfig, TrainResult, train
from resnet.training.checkpoints import read_checkpoint
from tests.helpers.runs import command

ENDLESS = 100_000  # epochs: the kill comes first


@dataclasses.dataclass
class Kills:
    """What became of a run under so many kills."""

    kills: int = 0
    in_a_write: int = 0  # kills that left a part of a checkpoint beside it
    checkpoints: int = 0  # found after a kill, each of them whole
    resumed: int = 0  # times that training went on for an epoch from what was found
    seconds: float = 0.0


def kill_again_and_again(folder: Path, kills: int, *, seed: int, limit_train: int, longest: float) -> Kills:
    """Starts the command so many times, from its checkpoint where there is one, and kills it at a random moment.

    The moment is up to `longest` seconds after the bar of the first to third epoch, and for every second kill the next
    one after it at which a checkpoint is being written. AssertionError where a checkpoint is not whole, has fewer
    epochs than the one before or does not go on, and where the epochs in the end are not those of a run that nobody
    killed.
    """
    net, log = folder / "net.pt", folder / "log.jsonl"
    config = TrainConfig(
        impl="fused",
        device="cpu",
        epochs=ENDLESS,
        batch_size=32,
        resize=28,
        lr=0.01,
        limit_train=limit_train,
        limit_test=16,
        save=str(net),
        log=str(log),
    )
    moments = random.Random(seed)
    found = Kills()
    start = time.perf_counter()
    epochs = 0
    while found.kills < kills:
        bar = f"epoch {epochs + moments.randint(1, 3)}/"
        seconds, in_a_write = moments.uniform(0, longest), found.kills % 2 == 1
        _start_and_kill(_from(net, config), folder, bar, seconds, in_a_write)
        found.kills += 1
        found.in_a_write += any(folder.glob(".*.part"))
        if not net.exists():
            assert epochs == 0, "the checkpoint is gone"
            continue
        found.checkpoints += 1
        reached = read_checkpoint(str(net), torch.device("cpu"))["epoch"]
        assert reached >= epochs, f"epoch {reached} came after epoch {epochs}"
        epochs = reached + 1
        result = train(dataclasses.replace(_from(net, config), epochs=epochs))
        assert not list(folder.glob(".*.part")), "the next write leaves no part of a killed one"
        found.resumed += 1
    if epochs:
        unbroken = train(dataclasses.replace(config, epochs=epochs, save=None, log=None))
        assert _figures(result) == _figures(unbroken)
        assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == list(range(1, epochs + 1))
    found.seconds = time.perf_counter() - start
    return found


def _from(net: Path, config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, resume=str(net) if net.exists() else None)


def _start_and_kill(config: TrainConfig, folder: Path, bar: str, seconds: float, in_a_write: bool) -> None:
    """So many seconds after it has shown the bar."""
    said = folder / "said.txt"
    with said.open("w") as stderr:
        process = command(config, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        while bar not in said.read_text():
            assert process.poll() is None, said.read_text()
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        while in_a_write and not any(folder.glob(".*.part")):
            assert process.poll() is None, said.read_text()
            time.sleep(0.001)
        assert process.poll() is None, said.read_text()
    finally:
        process.kill()
        process.wait()


def _figures(result: TrainResult) -> list[tuple[float, float, float]]:
    return [(epoch.loss, epoch.train_acc, epoch.test_acc) for epoch in result.epochs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-train", type=int, default=64)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands; the same bits need the same number of threads
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = kill_again_and_again(
            Path(folder), arguments.kills, seed=arguments.seed, limit_train=arguments.limit_train, longest=1.0
        )
    print(found)


if __name__ == "__main__":
    main()
