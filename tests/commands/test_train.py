"""resnet.train: the command's output, its files, Ctrl-C and its errors, on a few images of Fashion-MNIST."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from resnet import FusedResidual, Residual, models, resnet18
from resnet.commands import DTYPES, ConfigError, find_device
from resnet.data import Batches, DatasetError
from resnet.fused.block import FusedBlock
from resnet.models import IMPLS
from resnet.train import main
from resnet.training import (
    Epoch,
    NonFiniteError,
    TrainConfig,
    TrainResult,
    interrupts,
    loop,
    metrics,
    preparation,
    train,
)
from resnet.training.recipes import RECIPES, rate
from tests.helpers.graphs import captures_on_the_cpu
from tests.helpers.runs import CUDA, as_typed, begun, command, load_once, options, small_runs  # noqa: F401

SMALL = {"epochs": 1, "batch_size": 8, "resize": 32, "limit_train": 16, "limit_test": 16, "device": "cpu"}
# To compare losses of: few images, since CPUs emulate float16, but large, since on 1x1 maps rounding decides the
# variance of a few values; and steps that matter little, since float16's loss scaler leaves out the first one.
GENTLE = {"batch_size": 4, "limit_train": 8, "limit_test": 2, "resize": 64, "lr": 1e-4}

LOSS_LINE = r"loss (\d+\.\d{3}), train acc ([01]\.\d{3}), test acc ([01]\.\d{3})"
RATE_LINE = r"(\d+\.\d) examples/sec on cpu"


def small(impl: str = "eager", **changes) -> TrainConfig:
    return TrainConfig(impl=impl, **{**SMALL, **changes})


def weights_of(path: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_a_model_of_an_earlier_version_is_its_impl_and_a_line_says_so(capsys, impl):
    assert TrainConfig(model=impl) == TrainConfig(model="resnet18", impl=impl)
    note = f"--model {impl} is now --impl {impl}; --model names the net, here resnet18\n"
    assert capsys.readouterr().err == note


def test_the_command_takes_a_model_of_an_earlier_version(capsys):
    words = ["--model", "eager", "--device", "cpu", "--batch-size", "8", "--resize", "33", "--epochs", "1"]
    assert main([*words, "--limit-train", "8", "--limit-test", "8", "--json", "figures.json"]) == 0
    assert capsys.readouterr().err.startswith("--model eager is now --impl eager")
    found = json.loads(Path("figures.json").read_text())["config"]
    assert (found["model"], found["impl"]) == ("resnet18", "eager")


def test_the_net_and_what_runs_it_are_resnet18_and_fused_unless_named(capsys):
    assert (TrainConfig().model, TrainConfig().impl) == ("resnet18", "fused")
    with pytest.raises(SystemExit):
        main(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert "--model {resnet18,resnet34,resnet50} the net (default: resnet18)" in page
    assert "--impl {eager,fused,compile} what runs its blocks; compile: torch.compile of eager (default: fused)" in page


@pytest.mark.parametrize(("model", "impl"), models.BUILDERS)
def test_each_model_has_a_net_of_its_depth_for_each_impl(model, impl):
    with torch.device("meta"):
        net = models.BUILDERS[model, impl](num_classes=7, in_channels=2)
        eager = models.BUILDERS[model, "eager"](num_classes=7, in_channels=2)
    blocks = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}
    assert [len(stage) for stage in net[1:5]] == blocks[model]
    assert list(net.state_dict()) == list(eager.state_dict())
    assert isinstance(net[1][0], FusedBlock) == (impl == "fused")


def test_the_command_ends_with_the_two_lines_and_shows_a_bar(tmp_path):
    process = command(small(epochs=2, json=str(tmp_path / "figures.json"), save=str(tmp_path / "net.pt")))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 2
    loss = re.fullmatch(LOSS_LINE, lines[0])
    rate = re.fullmatch(RATE_LINE, lines[1])
    assert loss, lines
    assert rate, lines
    for epoch in ("epoch 1/2", "epoch 2/2"):
        assert re.search(
            epoch + r": 100%\|.*\| 16/16 .*loss \d+\.\d+, train acc \d\.\d+, \d+\.\d examples/sec, test acc \d", err
        )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [f"{figures[k]:.3f}" for k in ("loss", "train_acc", "test_acc")] == list(loss.groups())
    assert f"{figures['examples_per_sec']:.1f}" == rate[1]
    heads, *rows = err.splitlines()[-3:]
    assert heads.split() == ["epoch", "loss", "train", "acc", "test", "acc", "seconds"]
    last = [f"{figures[name]:.3f}" for name in ("loss", "train_acc", "test_acc")]
    assert [row.split()[0] for row in rows] == ["1", "2"] and rows[1].split()[1:4] == last
    assert len({len(heads), *map(len, rows)}) == 1, "columns are below each other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "net.pt"], "nothing temporary is left"


def test_json_holds_settings_epochs_device_source_and_versions(tmp_path, capsys):
    config = small(epochs=2, seed=3, json=str(tmp_path / "figures.json"))
    assert main(options(config)) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["config"] == dataclasses.asdict(config)
    assert figures["device"] == "cpu"
    assert figures["cuda_graph"] is False
    assert figures["data"] == load_once(None).source
    assert figures["versions"]["torch"] == torch.__version__
    assert not figures["interrupted"]
    assert figures["checkpoint"] is None
    first, last = figures["epochs"]
    assert first["examples"] == last["examples"] == 16
    assert {k: last[k] for k in ("loss", "train_acc", "test_acc")} == {
        k: figures[k] for k in ("loss", "train_acc", "test_acc")
    }
    assert figures["examples_per_sec"] == pytest.approx(32 / (first["seconds"] + last["seconds"]))


def test_the_published_form_is_printed_for_the_published_figures():
    epoch = Epoch(loss=0.0141, train_acc=0.9962, test_acc=0.8949, examples=46802, seconds=10.0)
    result = TrainResult(
        config=TrainConfig(),
        device="cuda:0",
        device_name="",
        processes=1,
        cuda_graph=False,
        data="",
        warm_up_seconds=0.0,
        epochs=(epoch,),
        interrupted=False,
        checkpoint=None,
    )
    published = "loss 0.014, train acc 0.996, test acc 0.895\n4680.2 examples/sec on cuda:0"
    assert result.summary() == published
    assert dataclasses.replace(result, cuda_graph=True).summary() == f"{published} as a CUDA graph"


# ---- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_training_lowers_the_loss(impl):
    result = train(small(impl, epochs=4, batch_size=16, limit_train=64, lr=0.003))
    assert result.loss < 0.5 * result.epochs[0].loss
    assert result.train_acc > 0.6


def test_fused_follows_eager():
    """With steps so small that rounding does not grow from one to the next, as it may with larger ones."""
    settings = {"batch_size": 16, "limit_train": 64, "resize": 33}
    still, eager, fused = (
        train(small(impl, lr=lr, **settings)).loss for impl, lr in (("eager", 1e-9), ("eager", 1e-5), ("fused", 1e-5))
    )
    assert fused == pytest.approx(eager, rel=1e-4)
    assert still != pytest.approx(eager, rel=5e-4)


def test_everything_is_compiled_before_the_clock_starts_and_leaves_no_trace(tmp_path, monkeypatch):
    """With two shapes of batches. Traced, not built: tests/resnet/test_ops.py builds a net."""
    epoch = loop._Run.epoch
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(loop._Run, "epoch", torch.compiler.set_stance("fail_on_recompile")(epoch))
    settings = {"epochs": 2, "limit_train": 12, "resize": 33}
    eager, compiled = (
        train(small(impl, save=str(tmp_path / f"{impl}.pt"), **settings)) for impl in ("eager", "compile")
    )
    assert [e.loss for e in compiled.epochs] == [e.loss for e in eager.epochs]
    assert eager.warm_up_seconds == 0 < compiled.warm_up_seconds
    expected = weights_of(eager.checkpoint)
    for name, value in weights_of(compiled.checkpoint).items():  # BatchNorm's statistics among them
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("bfloat16", {"resize": 33, "limit_train": 16, "lr": 1e-3}),
        ("bfloat16", {"resize": 33, "limit_train": 16, "lr": 1e-3, "impl": "fused"}),
        ("float16", GENTLE),
    ],
    ids=["eager bfloat16", "fused bfloat16", "eager float16"],
)
def test_half_precision_follows_float32_and_the_weights_stay_float32(tmp_path, dtype, settings):
    config = small(dtype=dtype, save=str(tmp_path / "net.pt"), **settings)
    result = train(config)
    reference = train(dataclasses.replace(config, dtype="float32", save=None))
    assert result.loss != reference.loss
    assert result.loss == pytest.approx(reference.loss, rel=0.05)
    assert {v.dtype for v in weights_of(config.save).values() if v.is_floating_point()} == {torch.float32}


def test_a_step_that_the_loss_scaler_skips_is_no_error(tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    # So large a scale that float16 gradients overflow, which the scaler answers by a skipped step.
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**60))
    config = small(dtype="float16", batch_size=2, limit_train=2, limit_test=2, save=str(tmp_path / "net.pt"))
    train(config)
    first = dict(preparation.net_of("resnet18", "eager", config.seed).named_parameters())
    trained = weights_of(config.save)
    assert all(torch.equal(trained[name], value) for name, value in first.items())


def test_a_seed_gives_the_same_figures_again_and_another_seed_others():
    a, b, other = (train(small(seed=seed)) for seed in (1, 1, 2))
    assert (a.loss, a.train_acc, a.test_acc) == (b.loss, b.train_acc, b.test_acc)
    assert other.loss != a.loss


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    train(small())
    assert torch.equal(torch.get_rng_state(), before)


def test_looking_at_the_losses_more_often_changes_nothing(monkeypatch):
    losses = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(loop, "_LOOK_SECONDS", seconds)
        losses.append(train(small(limit_train=20)).loss)
    assert losses[0] == losses[1]


def test_the_loss_is_the_mean_over_images_and_not_over_batches():
    """At a learning rate too small to change anything, so that an epoch's loss can be had at once."""
    config = small(limit_train=10, batch_size=8, lr=1e-30)
    data = load_once(None)
    net = preparation.net_of("resnet18", "eager", config.seed).to(memory_format=torch.channels_last)
    total = 0.0
    for x, labels in Batches(
        data.train_images[:10], data.train_labels[:10], 8, device="cpu", resize=32, shuffle=True, seed=config.seed
    ):
        total += torch.nn.functional.cross_entropy(net(x), labels, reduction="sum").item()
    assert train(config).loss == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_first_weights_are_xavier_uniform_and_the_same_for_each_impl(impl):
    net = preparation.net_of("resnet18", impl, seed=0)
    for name, weight in net.named_parameters():
        if weight.dim() > 1:
            fan_out, fan_in = weight.shape[0] * weight[0, 0].numel(), weight[0].numel()
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < weight.abs().max() <= bound, name
    eager = preparation.net_of("resnet18", "eager", seed=0).state_dict()
    assert all(torch.equal(eager[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("resize", "limit", "examples"),
    [(28, 17, 16), (32, 17, 16), (33, 17, 17), (28, 18, 18)],
    ids=["28 pixels", "32 pixels", "33 pixels", "two images"],
)
def test_a_last_batch_of_one_image_is_left_out_only_where_it_has_one_value_per_channel(capsys, resize, limit, examples):
    result = train(small(limit_train=limit, resize=resize))
    assert result.epochs[0].examples == examples
    assert ("One image is left out" in capsys.readouterr().err) == (examples < limit)


@CUDA
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_trains_as_the_cpu_does(impl, dtype):
    cpu = train(small(**GENTLE))
    cuda = train(small(impl, dtype=dtype, device="cuda", **GENTLE))
    assert cuda.device == f"cuda:{torch.cuda.current_device()}"
    assert cuda.loss == pytest.approx(cpu.loss, rel=0.01 if dtype == "float32" else 0.05)


# ---- CUDA graphs ------------------------------------------------------------------------------------------------

WITH_A_SHORT_BATCH = {"epochs": 2, "limit_train": 20, "resize": 33, "lr": 0.003}


@pytest.fixture
def stand_in(monkeypatch) -> list[int]:
    return captures_on_the_cpu(monkeypatch)


def epochs_without_times(result: TrainResult) -> list[Epoch]:
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in result.epochs]


@pytest.mark.parametrize(
    ("impl", "limit"),
    [("eager", 20), ("fused", 20), ("fused", 16), ("eager", 5)],
    ids=["eager, a short batch", "fused, a short batch", "whole batches", "less than a batch"],
)
def test_replays_train_as_steps_do(tmp_path, stand_in, impl, limit):
    settings = {**WITH_A_SHORT_BATCH, "limit_train": limit}
    off, on = (
        train(small(impl, cuda_graph=graph, save=str(tmp_path / f"{graph}.pt"), **settings)) for graph in ("off", "on")
    )
    assert stand_in == [2 * max(limit // 8, 1)], "each whole batch of two epochs"
    assert (off.cuda_graph, on.cuda_graph) == (False, True)
    assert epochs_without_times(on) == epochs_without_times(off)
    expected = weights_of(off.checkpoint)
    for name, value in weights_of(on.checkpoint).items():  # BatchNorm's statistics and counts among them
        assert torch.equal(value, expected[name]), name


def test_the_loss_scaler_is_as_it_was_before_the_warm_up(monkeypatch, stand_in):
    """Though each of the warm-up's steps overflows, which halves the scale."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = run_of(small(cuda_graph="on", dtype="float16", batch_size=2, limit_train=2))
    first = scaler("cpu").state_dict()
    assert run.scaler.state_dict() == first
    run._step(torch.arange(2))
    assert run.scaler.state_dict()["scale"] == first["scale"] / 2


def test_what_a_graph_reads_and_writes_stays_where_it_is(tmp_path, monkeypatch, stand_in):
    """Over warm-up, epochs, evaluation and checkpoints, and what a user's in-place load writes."""
    runs, places = [], []
    learn = loop._Run._learn

    def noted(run, index):
        runs.append(run)
        state = [*run.net.state_dict().values(), run.optimizer.param_groups[0]["lr"]]
        if len(index) == 8:
            places.append([tensor.data_ptr() for tensor in state])
        return learn(run, index)

    monkeypatch.setattr(loop._Run, "_learn", noted)
    train(small(cuda_graph="on", save=str(tmp_path / "net.pt"), **WITH_A_SHORT_BATCH))
    runs[0].net.load_state_dict(weights_of(tmp_path / "net.pt"))
    runs[0]._step(torch.arange(8))
    assert len(places) > 5 and all(place == places[0] for place in places)


def run_of(config: TrainConfig) -> loop._Run:
    """Warmed up, and captured where the configuration asks for that."""
    run = begun(config)
    run.warm_up()
    return run


def weights_move(run: loop._Run, index: torch.Tensor) -> bool:
    before = [parameter.detach().clone() for parameter in run.net.parameters()]
    run._step(index)
    return not all(torch.equal(*pair) for pair in zip(before, run.net.parameters(), strict=True))


def check_that_a_rate_changed_between_replays_counts(config: TrainConfig) -> None:
    run = run_of(config)
    assert run.graph is not None
    index = torch.arange(config.batch_size, device=run.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.0 if step == 1 else 1.0)
    moved = []
    for _ in range(3):
        moved.append(weights_move(run, index))
        schedule.step()
    assert moved == [True, False, True]


def test_a_learning_rate_changed_between_replays_counts(stand_in):
    check_that_a_rate_changed_between_replays_counts(small(cuda_graph="on"))


@CUDA
def test_a_learning_rate_changed_between_replays_counts_on_a_gpu():
    check_that_a_rate_changed_between_replays_counts(small("fused", device="cuda"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_learning_rate_is_a_tensor_that_the_optimizer_s_step_reads_on_the_device(dtype):
    """A CUDA graph keeps a Python number; a step that asks for the tensor's value waits, which no capture allows."""
    run = run_of(small(dtype=dtype))
    (group,) = run.optimizer.param_groups
    assert group["fused"] and group["lr"].device == run.device and group["lr"].dtype == torch.float32


@pytest.mark.parametrize(
    ("graph", "impl", "device", "wanted"),
    [
        ("auto", "eager", "cuda:0", True),
        ("auto", "fused", "cuda:0", True),
        ("auto", "compile", "cuda:0", False),
        ("auto", "fused", "cpu", False),
        ("on", "fused", "cuda:0", True),
        ("off", "fused", "cuda:0", False),
    ],
)
def test_auto_is_a_graph_where_that_can_be(graph, impl, device, wanted):
    assert preparation.wants_graph(TrainConfig(impl=impl, cuda_graph=graph), torch.device(device)) == wanted


def test_no_graph_of_torch_compile_even_on_a_gpu():
    with pytest.raises(ConfigError, match="--cuda-graph on: expected --impl eager or fused"):
        preparation.wants_graph(TrainConfig(impl="compile", cuda_graph="on"), torch.device("cuda:0"))


def test_ctrl_c_between_replays_leaves_a_checkpoint_that_says_where(tmp_path, monkeypatch, stand_in):
    interrupt_before(monkeypatch, "_step")
    result = train(small(cuda_graph="on", epochs=3, save=str(tmp_path / "net.pt")))
    checkpoint = torch.load(result.checkpoint, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (0, 1) and stand_in == [1]


def test_a_replay_s_non_finite_loss_names_its_step(tmp_path, stand_in):
    with pytest.raises(NonFiniteError, match=r"non-finite loss \(nan\) at epoch 1, step 2;"):
        train(small(cuda_graph="on", lr=1e25, limit_train=40))


@CUDA
@pytest.mark.parametrize("impl", ["eager", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_trains_as_steps_do_on_a_gpu(tmp_path, impl, dtype):
    settings = {**WITH_A_SHORT_BATCH, "resize": 64, "lr": 1e-3, "dtype": dtype, "device": "cuda"}
    off, on = (
        train(small(impl, cuda_graph=graph, save=str(tmp_path / f"{graph}.pt"), **settings)) for graph in ("off", "on")
    )
    assert on.cuda_graph and not off.cuda_graph
    tolerance = 0.01 if dtype == "float32" else 0.05
    assert [e.loss for e in on.epochs] == pytest.approx([e.loss for e in off.epochs], rel=tolerance)
    expected = weights_of(off.checkpoint)
    for name, value in weights_of(on.checkpoint).items():
        if name.endswith("num_batches_tracked"):
            assert value == expected[name] == 6, name
        else:
            torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


# ---- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_a_checkpoint_loads_into_either_block_and_gives_the_same_accuracy(tmp_path, impl):
    config = small(impl, save=str(tmp_path / "net.pt"), limit_train=64, limit_test=100)
    result = train(config)
    assert result.checkpoint == config.save
    checkpoint = torch.load(config.save, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 0)
    assert checkpoint["args"] == dataclasses.asdict(config)
    data = load_once(None)
    for block in (Residual, FusedResidual):
        net = resnet18(block=block)
        net.load_state_dict(checkpoint["model"], strict=True)
        torch.optim.SGD(net.parameters(), lr=1.0).load_state_dict(checkpoint["optimizer"])
        net.eval()
        ((x, labels),) = Batches(
            data.test_images[:100], data.test_labels[:100], 100, device="cpu", resize=config.resize
        )
        with torch.no_grad():
            accuracy = (net(x).argmax(1) == labels).float().mean().item()
        assert accuracy == pytest.approx(result.test_acc, abs=0.011), "but for one tie at most"


def test_a_path_may_be_one_of_pathlib_s(tmp_path):
    """Neither --json nor a checkpoint that is read without running code could hold it."""
    path = tmp_path / "net.pt"
    result = train(small(save=path, log=tmp_path / "log"))
    assert torch.load(path, weights_only=True)["args"]["log"] == str(tmp_path / "log")
    assert json.loads(json.dumps(result.to_json()))["checkpoint"] == str(path)


def test_a_checkpoint_is_written_after_every_epoch(tmp_path, monkeypatch):
    written = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda what, path: (written.append(what["epoch"]), save(what, path)))
    train(small(epochs=3, save=str(tmp_path / "net.pt")))
    assert written == [1, 2, 3]


def limit_files(size: int = 1 << 20) -> None:
    """To have in a process: no file may be longer, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"the old checkpoint")

    process = command(small(save=str(path)), preexec_fn=limit_files)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and re.fullmatch(f"{LOSS_LINE}\n{RATE_LINE}\n", out)
    assert err.splitlines()[-1] == f"python -m resnet.train: error: {path}: cannot be written (File too large)"
    assert path.read_bytes() == b"the old checkpoint"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_cannot_be_written_is_written_elsewhere_and_the_figures_are_kept(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    assert main(options(small(epochs=3, save="/dev/full", json="figures.json"))) == 1
    out, err = capsys.readouterr()
    (saved,) = tmp_path.glob("*.pt")
    reason = f"/dev/full: cannot be written (No space left on device); the weights are in {saved}"
    assert err.splitlines()[-1] == f"python -m resnet.train: error: {reason}"
    assert re.fullmatch(f"{LOSS_LINE}\n{RATE_LINE}\n", out)
    figures = json.loads(Path("figures.json").read_text())
    assert len(figures["epochs"]) == torch.load(saved)["epoch"] == 1 and figures["checkpoint"] == str(saved)


def test_figures_that_cannot_be_kept_are_printed(tmp_path):
    """And what is on the disk stays: here no file may be longer than 100 bytes."""
    path = tmp_path / "figures.json"
    path.write_text("the old figures")
    process = command(small(json=str(path)), preexec_fn=functools.partial(limit_files, 100))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and re.fullmatch(f"{LOSS_LINE}\n{RATE_LINE}\n", out)
    assert err.splitlines()[-1] == f"python -m resnet.train: error: {path}: cannot be written (File too large)"
    assert path.read_text() == "the old figures" and list(tmp_path.iterdir()) == [path]


def test_figures_that_cannot_be_printed_are_kept(tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = command(small(json=str(tmp_path / "figures.json")), stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=120)
    reason = "python -m resnet.train: error: standard output: cannot be written (Broken pipe)"
    assert process.returncode == 1 and err.splitlines()[-1] == reason
    assert len(json.loads((tmp_path / "figures.json").read_text())["epochs"]) == 1


# ---- the log and the plot --------------------------------------------------------------------------------------


def lines_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_log_has_a_line_per_epoch_and_per_so_many_steps_and_a_resumed_run_adds_to_it():
    settings = {"limit_train": 8, "limit_test": 4, "batch_size": 4, "resize": 33, "lr": 0.01, "log": "log"}
    Path("log").write_text("of another run\n")
    train(small(epochs=1, log_every=2, save="net.pt", **settings))
    assert [(line["epoch"], line.get("step")) for line in lines_of("log")] == [(1, 2), (1, None)]
    with open("log", "a") as log:  # of a run that was killed in its second epoch
        log.write('{"epoch": 2, "step": 2, "loss": 9.0, "lr": 0.01}\n{"epoch": 2, "st')

    result = train(small(epochs=2, log_every=1, resume="net.pt", **settings))
    lines = lines_of("log")
    places = [(line["epoch"], line.get("step")) for line in lines]
    assert places == [(1, 2), (1, None), (2, 1), (2, 2), (2, None)]
    assert all(line["lr"] == 0.01 for line in lines)
    assert sum(line["loss"] for line in lines[2:4]) / 2 == pytest.approx(result.loss)
    for line, epoch in zip((lines[1], lines[4]), result.epochs):
        expected = {name: getattr(epoch, name) for name in ("loss", "train_acc", "test_acc", "seconds")}
        assert line == {"epoch": line["epoch"], **expected, "lr": 0.01}


def test_lines_that_come_again_are_left_out_and_others_are_kept():
    kept = (
        b"[" * 100_000 + b'\na note\n[1]\n{"epoch": 1, "step": 5}\n{"epoch": 1, "loss": 1.0}\n{"epoch": 2, "step": 3}\n'
    )
    later = b'{"epoch": 2, "step": 4}\n{"epoch": 2, "loss": 1.0}\n{"epoch": 3, "step": 1}\n'
    assert metrics.lines_until(kept + later + b'{"epoch"', epochs=1, step=3) == kept


def test_a_pipe_gets_all_lines_of_a_log():
    os.mkfifo("pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_text()))
    reader.start()
    log = metrics.Log("pipe")
    log.go_on(epochs=1, step=0)  # which reads no pipe
    log.write(epoch=2, loss=0.5)
    log.write(epoch=3, loss=0.25)
    log.close()
    reader.join(timeout=60)
    assert received == ['{"epoch": 2, "loss": 0.5}\n{"epoch": 3, "loss": 0.25}\n']


def test_an_interrupted_run_leaves_its_lines_and_its_plot(monkeypatch):
    pytest.importorskip("matplotlib")
    seen = []
    interrupt_before(monkeypatch, "save")
    save = loop._Run.save
    monkeypatch.setattr(loop._Run, "save", lambda run, path: (seen.append(lines_of("log")), save(run, path))[1])
    monkeypatch.setitem(RECIPES, "quick", dataclasses.replace(RECIPES["best"], stem="textbook", average=0.0))
    settings = {"recipe": "quick", "epochs": 2, "batch_size": 4, "limit_train": 8, "limit_test": 4, "resize": 33}
    config = small(save="net.pt", log="log", log_every=1, plot="out.png", **settings)
    assert main(options(config)) == 130
    first, second, epoch = seen[0]  # in the file before anything else is done
    assert [first["lr"], second["lr"]] == [rate(config.plan, step, 4) for step in range(2)]
    assert epoch["lr"] == second["lr"] != first["lr"]
    assert seen[-1] == lines_of("log") and Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_that_takes_no_more_is_one_line(capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    assert main(options(small(log="/dev/full", limit_train=8, limit_test=1, batch_size=8))) == 1
    (saved,) = Path().glob("*.pt")
    reason = f"/dev/full: cannot be written (No space left on device); the weights are in {saved.resolve()}"
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m resnet.train: error: {reason}"


@pytest.mark.parametrize("planned", [1, 3])
def test_the_plot_has_the_textbook_s_three_curves_over_all_epochs_that_are_planned(planned):
    pytest.importorskip("matplotlib")
    from resnet import plots

    epochs = [Epoch(2.0 / n, 0.3 * n, 0.25 * n, 16, 1.0) for n in range(1, min(planned, 2) + 1)]
    (axes,) = plots.training(epochs, planned).axes
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    numbers = list(range(1, len(epochs) + 1))
    assert curves == {
        "train loss": (numbers, [epoch.loss for epoch in epochs]),
        "train acc": (numbers, [epoch.train_acc for epoch in epochs]),
        "test acc": (numbers, [epoch.test_acc for epoch in epochs]),
    }
    assert axes.get_xlim() == ((0.5, 1.5) if planned == 1 else (1, 3))


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "status", "named"),
    [("SIGINT", 130, True), ("SIGTERM", 143, False), ("SIGHUP", 129, True)],
    ids=["Ctrl-C, --save", "SIGTERM, no --save", "SIGHUP, --save"],
)
def test_a_signal_leaves_a_usable_checkpoint_and_says_where(tmp_path, name, status, named):
    folder = tmp_path / "run"
    folder.mkdir()
    log = tmp_path / "stderr"
    endless = small(epochs=100_000, save=str(folder / "net.pt") if named else None)
    with log.open("w") as stderr:
        # nohup around the tests has one of them ignored.
        restored = functools.partial(signal.signal, getattr(signal, name), signal.SIG_DFL)
        process = command(endless, cwd=folder, stderr=stderr, preexec_fn=restored)
    try:
        wait_for("epoch 2/", log, process)
        process.send_signal(getattr(signal, name))
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, log.read_text()
    assert out == "", "the closing lines are those of a run that came to its end"
    (path,) = folder.iterdir()
    assert path.name == "net.pt" or not named
    assert f"checkpoint in {path}" in log.read_text()
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["epoch"] >= 1
    assert checkpoint["args"] == dataclasses.asdict(endless)
    for block in (Residual, FusedResidual):
        resnet18(block=block).load_state_dict(checkpoint["model"], strict=True)


def test_ctrl_c_leaves_a_checkpoint_though_it_ended_the_reader_of_standard_error_too(tmp_path):
    """As in `python -m resnet.train 2>&1 | tee log`."""
    path = tmp_path / "net.pt"
    read, write = os.pipe()
    restored = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = command(small(epochs=100_000, save=str(path)), stderr=write, preexec_fn=restored)
    os.close(write)
    try:
        with open(read, "rb", buffering=0) as shown:
            text = b""
            while b"epoch 2/" not in text:
                text += (part := shown.read(1 << 16))
                assert part, text
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["epoch"] >= 1


def test_ctrl_c_amid_a_write_to_standard_error_ends_the_run_after_the_step(monkeypatch):
    class Interrupting(io.RawIOBase):
        writes = 0

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            self.writes += b"epoch 1/" in bytes(data)
            if self.writes == 1:
                signal.raise_signal(signal.SIGINT)
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Interrupting()), line_buffering=True))
    result = train(small(epochs=3, save="net.pt"))
    assert result.interrupted and result.checkpoint == "net.pt"


def interrupt_before(monkeypatch, method: str) -> None:
    """Ctrl-C at the moment that a run's method is called for the first time."""
    original = getattr(loop._Run, method)

    def interrupted(*args):
        monkeypatch.setattr(loop._Run, method, original)
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(loop._Run, method, interrupted)


@pytest.mark.parametrize(
    ("method", "epoch", "step"),
    [("_loss", 0, 1), ("_accuracy", 1, 0), ("save", 1, 0)],
    ids=["in a step", "in the evaluation", "while the checkpoint is written"],
)
def test_ctrl_c_stops_between_two_steps_and_the_checkpoint_says_where(tmp_path, monkeypatch, method, epoch, step):
    interrupt_before(monkeypatch, method)
    config = small(epochs=3, save=str(tmp_path / "net.pt"))
    result = train(config)
    assert result.interrupted
    checkpoint = torch.load(result.checkpoint, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (epoch, step)


def test_ctrl_c_leaves_the_figures_of_the_whole_epochs(tmp_path, monkeypatch):
    interrupt_before(monkeypatch, "save")
    path = tmp_path / "figures.json"
    assert main(options(small(epochs=3, save=str(tmp_path / "net.pt"), json=str(path)))) == 130
    figures = json.loads(path.read_text())
    assert figures["interrupted"] and figures["signal"] == "SIGINT"
    assert len(figures["epochs"]) == 1


def test_ctrl_c_before_the_first_step_leaves_an_old_checkpoint(tmp_path, monkeypatch, capsys):
    interrupt_before(monkeypatch, "warm_up")
    path = tmp_path / "net.pt"
    path.write_bytes(b"the old checkpoint")
    assert main(options(small(save=str(path)))) == 130
    assert path.read_bytes() == b"the old checkpoint"
    assert "nothing to save" in capsys.readouterr().err


def test_ctrl_c_leaves_a_checkpoint_though_the_current_folder_was_removed(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    interrupt_before(monkeypatch, "_step")
    load_once(None)  # some of the set's places are relative to the folder
    folder.rmdir()
    path = tmp_path / "net.pt"
    assert main(options(small(save=str(path)))) == 130
    assert torch.load(path, weights_only=True)["step"] == 1


def test_ctrl_c_where_no_checkpoint_can_be_written_says_so(tmp_path, monkeypatch, capsys):
    interrupt_before(monkeypatch, "_step")
    path = str(tmp_path / "gone" / "net.pt")
    monkeypatch.setattr(loop, "_unused_paths", lambda config: [path])
    assert main(options(small())) == 1
    *_, line, error = capsys.readouterr().err.splitlines()
    assert line == "interrupted after 0 epochs; not saved"
    assert error == f"python -m resnet.train: error: {path}: cannot be written (No such file or directory)"


def test_ctrl_c_after_all_work_is_done_does_not_spoil_it(tmp_path, monkeypatch):
    interrupt_before(monkeypatch, "save")
    assert main(options(small(save=str(tmp_path / "net.pt")))) == 0


def test_a_second_ctrl_c_stops_at_once():
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts.deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == usual


def test_ctrl_c_while_the_data_are_read_is_exit_status_130(monkeypatch):
    monkeypatch.setattr(preparation, "load", lambda folder: signal.raise_signal(signal.SIGINT))
    assert main(options(small())) == 130


def test_training_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(train(small())))
    thread.start()
    thread.join()
    assert len(results) == 1


# ---- losses that are not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["looking at every step", "looking at the end"])
def test_a_non_finite_loss_names_the_first_such_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys, seconds):
    monkeypatch.setattr(loop, "_LOOK_SECONDS", seconds)
    path = tmp_path / "net.pt"
    path.write_bytes(b"the old checkpoint")
    # One step at this rate leaves finite weights, whose activations overflow in the second.
    config = small(lr=1e25, limit_train=40, save=str(path), json=str(tmp_path / "figures.json"))
    assert main(options(config)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("python -m resnet.train: error: non-finite loss (nan) at epoch 1, step 2;")
    assert path.read_bytes() == b"the old checkpoint"
    assert list(tmp_path.iterdir()) == [path]


def test_the_step_named_is_that_of_its_epoch():
    losses = torch.tensor([1.0, 2.0, float("inf"), float("nan")])
    with pytest.raises(NonFiniteError, match=r"non-finite loss \(inf\) at epoch 3, step 13;"):
        loop._check_losses(losses, epoch=3, first_step=11)


def test_weights_that_the_last_step_made_non_finite_are_not_saved(tmp_path):
    path = tmp_path / "net.pt"
    with pytest.raises(NonFiniteError, match="non-finite weights after epoch 1, step 1;"):
        train(small(lr=3e38, limit_train=8, save=str(path)))
    assert not path.exists()


# ---- settings that cannot be used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "--model: expected one of resnet18, resnet34, resnet50, got resnet"),
        (["--model", "fused"], "--model: expected one of resnet18, resnet34, resnet50, got fused"),
        (["--impl", "resnet18"], "--impl: invalid choice: 'resnet18'"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--epochs", "two"], "--epochs: invalid int value: 'two'"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--batch-size", "-4"], "--batch-size: expected at least 1, got -4"),
        (["--batch-size", "9223372036854775808"], "--batch-size: expected at most 2**63 - 1, got 9223372036854775808"),
        (["--lr", "0"], "--lr: expected a positive number that float32 holds, got 0.0"),
        (["--lr", "1e-46"], "--lr: expected a positive number that float32 holds, got 1e-46"),
        (["--lr", "nan"], "--lr: expected a positive number that float32 holds, got nan"),
        (["--lr", "1e39"], "--lr: expected a positive number that float32 holds, got 1e+39"),
        (
            ["--resize", "27"],
            "--resize: expected at least 28, the images' own size: they are enlarged only, got 27",
        ),
        (["--resize", "32768"], "--resize: expected at most 32767 pixels, got 32768"),
        (["--dtype", "float64"], "--dtype: invalid choice: 'float64'"),
        (["--stem", "imagenet"], "--stem: invalid choice: 'imagenet'"),
        (["--cuda-graph", "yes"], "--cuda-graph: invalid choice: 'yes'"),
        (["--cuda-graph", "on"], "--cuda-graph on: expected a CUDA device, which has such graphs, got cpu"),
        (
            ["--cuda-graph", "on", "--impl", "compile"],
            "--cuda-graph on: expected --impl eager or fused, which it captures, got compile",
        ),
        (["--seed", "-1"], "--seed: expected a number from 0 to 2**63 - 1, got -1"),
        (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "meta"], "--device: expected auto, cpu, cuda or cuda:N, got meta"),
        (["--device", "cuda:99"], "--device: expected "),
        (["--limit-train", "0"], "--limit-train: expected at least 1, got 0"),
        (["--limit-train", "60001"], "--limit-train: expected at most "),
        (["--limit-test", "10001"], "--limit-test: expected at most "),
        (["--data", "nowhere"], "nowhere: no such folder; expected one with train-images-idx3-ubyte"),
        (["--data", "~nosuchuser/data"], "~nosuchuser/data: no such folder; expected one with train-images-idx3-ubyte"),
        (["--data", "n" * 256], "n: no such folder; expected one with train-images-idx3-ubyte"),
        (["--data", "no\nwhere"], "no\\nwhere: no such folder"),
        (["--save", "net.pt", "--json", "./net.pt"], "--json: expected another file than that of --save, got net.pt"),
        (["--save", "nowhere/net.pt"], "--save: expected a path in an existing folder, got nowhere/net.pt"),
        (["--save", "."], "--save: expected a file's path, got the folder ."),
        (["--json", "nowhere/figures.json"], "--json: expected a path in an existing folder"),
        (["--log", "nowhere/log"], "--log: expected a path in an existing folder"),
        (["--log", "log", "--json", "log"], "--log: expected another file than that of --json, got log"),
        (["--log-every", "2"], "--log-every: expected --log or --tensorboard, which say where, got none"),
        (["--log-every", "0", "--log", "log"], "--log-every: expected at least 1, got 0"),
        (["--plot", "out.nothing"], "--plot"),
        (["--plot", "out.pgf"], "--plot"),
        (["--batch-size", "1", "--resize", "28"], "--resize 28 needs batches of 2 images or more"),
        (["--limit-train", "1", "--resize", "32"], "--resize 32 needs batches of 2 images or more"),
        (["--optimizer", "adam"], "unrecognized arguments: --optimizer adam"),
    ],
    ids=as_typed,
)
def test_what_cannot_be_used_is_one_line_and_exit_status_2_before_any_work(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(loop, "_Run", None)  # nothing may get so far
    with pytest.raises(SystemExit) as exit:
        main(["--device", "cpu", "--impl", "eager", *arguments])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    # Where the sample stands in for the set, one line more says so.
    *notes, line = err.splitlines()
    assert all("embedded sample" in note for note in notes)
    assert line.startswith("python -m resnet.train: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_where_there_is_none_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match="--device: expected auto or cpu, since PyTorch finds no CUDA device here"):
        train(small(device="cuda"))


def test_a_corrupted_data_file_is_one_line_that_names_it(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        (folder / name).write_bytes(b"\0\0\x08\x03")
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(DatasetError):
        train(small(data=str(folder)))
    with pytest.raises(SystemExit) as exit:
        main(options(small(data=str(folder))))
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder / 'train-images-idx3-ubyte'}: wrong size, expected 47040016 bytes, found only 4" in line


def test_auto_is_the_gpu_where_there_is_one():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
