"""resnet.training.recipes and --recipe: schedule, decay, augmentation, average, and the runs that they make."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from resnet import FusedResidual, Residual, Stem, resnet18
from resnet.data import Augmentation, Batches
from resnet.train import main
from resnet.training import ConfigError, TrainConfig, loop, preparation, train
from resnet.training.checkpoints import read_net
from resnet.training.recipes import RECIPES, Recipe, optimizer, rate, weight_average
from tests.conftest import DEVICE
from tests.helpers.graphs import captures_on_the_cpu
from tests.helpers.runs import CUDA, begun, load_once, small_runs  # noqa: F401

# All that a recipe may ask for, on a net that a CPU trains soon: the textbook's stem leaves a sixteenth of the pixels.
QUICK = dataclasses.replace(
    RECIPES["best"], epochs=2, batch_size=8, lr=0.01, resize=33, stem="textbook", warm_up=0.25, average=0.5
)
FEW = {"limit_train": 20, "limit_test": 16, "device": "cpu", "impl": "eager", "recipe": "quick"}


@pytest.fixture(autouse=True)
def quick_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "quick", QUICK)


@pytest.fixture
def stand_in(monkeypatch) -> list[int]:
    return captures_on_the_cpu(monkeypatch)


def quick(**changes) -> TrainConfig:
    return TrainConfig(**{**FEW, **changes})


# ---- the schedule ----------------------------------------------------------------------------------------------


def test_the_rate_rises_on_a_line_to_the_recipe_s_and_falls_along_a_cosine_to_nearly_nothing():
    recipe = Recipe(lr=2.0, warm_up=0.25)
    rates = [rate(recipe, step, 40) for step in range(40)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[24] == pytest.approx(1 + math.cos(math.pi * 15 / 31))
    assert 0 < rates[39] < 0.01


def test_without_a_warm_up_the_rate_is_the_recipe_s_at_each_step():
    assert {rate(RECIPES["textbook"], step, 10) for step in range(10)} == {0.05}


def test_each_step_is_taken_at_its_rate(monkeypatch):
    rates = []
    learn = loop._Run._learn

    def noted(run, index):
        rates.append([group["lr"].item() for group in run.optimizer.param_groups])
        return learn(run, index)

    monkeypatch.setattr(loop._Run, "_learn", noted)
    train(quick(limit_train=32))
    assert len(rates) == 8
    for step, of_groups in enumerate(rates):
        assert of_groups == pytest.approx([rate(QUICK, step, 8)] * 2), step


# ---- weight decay ----------------------------------------------------------------------------------------------


def test_norms_and_biases_do_not_decay_and_all_else_does():
    net = resnet18()
    sgd = optimizer(RECIPES["best"], net)
    decay = {p: group["weight_decay"] for group in sgd.param_groups for p in group["params"]}
    assert len(decay) == len(list(net.parameters()))
    for name, module in net.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            decays = isinstance(module, (nn.Conv2d, nn.Linear)) and kind == "weight"
            assert decay[parameter] == (5e-4 if decays else 0), f"{name}.{kind}"


def test_the_textbook_has_one_group_without_decay_and_momentum():
    (group,) = optimizer(RECIPES["textbook"], nn.Linear(2, 2)).param_groups
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0, 0, False)


def test_momenta_that_exist_from_the_start_step_as_pytorch_s_do():
    """Which makes them of the first gradients."""
    ours, theirs = (nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    recipe = Recipe(lr=0.1, momentum=0.9)
    steps = optimizer(recipe, ours), torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for seed in range(3):
        x = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
        for net, sgd in zip((ours, theirs), steps, strict=True):
            sgd.zero_grad()
            net(x).square().sum().backward()
            sgd.step()
        torch.testing.assert_close(ours.weight, theirs.weight)


# ---- augmentation ----------------------------------------------------------------------------------------------


def images(n: int, size: int = 6) -> Tensor:
    return torch.rand(n, size, size, generator=torch.Generator().manual_seed(0)) + 0.5  # nowhere 0


def chances(n: int, **given: float | Tensor) -> Tensor:
    """By name; those that are not given mirror nothing."""
    names = ("down", "right", "mirror", "top", "left", "grey")
    table = torch.full((n, Augmentation.CHANCES), 0.5)
    for name, value in given.items():
        table[:, names.index(name)] = value
    return table


def test_an_image_that_is_not_shifted_mirrored_or_erased_comes_out_as_it_was():
    x = images(3)
    assert torch.equal(Augmentation()(x, torch.rand(3, 6)), x)
    assert torch.equal(Augmentation(shift=1, flip=True)(x, chances(3)), x), "the middle of the offsets"


def test_a_shift_is_a_crop_of_the_padded_image_at_each_of_the_offsets():
    offsets = [(down, right) for down in range(5) for right in range(5)]
    x = images(len(offsets))
    down, right = (torch.tensor(offsets).T + 0.5) / 5
    shifted = Augmentation(shift=2)(x, chances(len(x), down=down, right=right))
    for image, (top, left), out in zip(x, offsets, shifted, strict=True):
        padded = F.pad(image, (2, 2, 2, 2))
        assert torch.equal(out, padded[top : top + 6, left : left + 6]), (top, left)


def test_the_largest_chance_is_the_last_offset():
    largest = torch.nextafter(torch.ones(()), torch.zeros(()))
    for shift in range(1, 15):
        x = images(1)
        out = Augmentation(shift=shift)(x, chances(1, down=largest, right=largest))
        padded = F.pad(x, (shift,) * 4)
        assert torch.equal(out, padded[:, 2 * shift :, 2 * shift :]), shift


def test_a_flip_mirrors_left_and_right_of_one_half_of_the_images():
    x = images(4)
    out = Augmentation(flip=True)(x, chances(4, mirror=torch.tensor([0.0, 0.49, 0.5, 0.99])))
    assert torch.equal(out, torch.cat([x[:2].flip(2), x[2:]]))


def test_a_square_of_one_grey_level_is_erased_and_nothing_else():
    places = [(top, left) for top in range(4) for left in range(4)]
    x = images(len(places))
    top, left = (torch.tensor(places).T + 0.5) / 4
    grey = torch.rand(len(x)) * 0.4
    erased = Augmentation(erase=3)(x, chances(len(x), top=top, left=left, grey=grey))
    for image, (row, column), level, out in zip(x, places, grey, erased, strict=True):
        image = image.clone()
        image[row : row + 3, column : column + 3] = level
        assert torch.equal(out, image), (row, column)


ALL = Augmentation(shift=2, flip=True, erase=8)


def batches(device="cpu", seed=0, augmentation=ALL, **changes) -> Batches:
    data = load_once(None)
    options = {"resize": 28, "shuffle": True, "seed": seed, "augmentation": augmentation, **changes}
    return Batches(data.train_images[:32], data.train_labels[:32], 16, device=device, **options)


def epoch_of(served: Batches) -> tuple[Tensor, Tensor]:
    x, labels = (torch.cat(parts) for parts in zip(*served, strict=True))
    return x, labels


def test_a_seed_gives_the_same_images_again_and_another_seed_or_epoch_others():
    served = batches()
    first, second = epoch_of(served)[0], epoch_of(served)[0]
    again = epoch_of(batches())[0]
    other = epoch_of(batches(seed=1))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, other)
    served.epoch = 0
    assert torch.equal(epoch_of(served)[0], first)


def test_without_shuffling_an_image_differs_from_epoch_to_epoch():
    served = batches(shuffle=False)
    first, second = epoch_of(served)[0], epoch_of(served)[0]
    assert (first != second).flatten(1).any(1).all()


def test_order_and_labels_are_those_of_a_run_without_augmentation():
    augmented, plain = (epoch_of(batches(augmentation=each)) for each in (ALL, None))
    assert torch.equal(augmented[1], plain[1])
    assert not torch.equal(augmented[0], plain[0])
    unchanged = epoch_of(batches(augmentation=Augmentation()))
    assert torch.equal(unchanged[0], plain[0])


def test_augmentation_keeps_type_format_and_size():
    for resize in (28, 40):
        (x, _), (plain, _) = (next(iter(batches(augmentation=each, resize=resize))) for each in (ALL, None))
        assert (x.shape, x.dtype, x.stride()) == (plain.shape, plain.dtype, plain.stride())


def test_augmentation_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    epoch_of(batches())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_graph_of_draw_reads_stays_where_it_is_over_epochs():
    served = batches()
    place = served._chances.data_ptr()
    epoch_of(served)
    epoch_of(served)
    assert served._chances.data_ptr() == place


@CUDA
def test_a_gpu_augments_as_the_cpu_does():
    (x, labels), (expected, expected_labels) = (epoch_of(batches(device)) for device in ("cuda", "cpu"))
    torch.testing.assert_close(x.cpu(), expected)
    assert torch.equal(labels.cpu(), expected_labels)


# ---- the average -----------------------------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(DEVICE)


def test_the_average_of_weights_and_statistics_is_the_formula_s():
    net = small_net()
    average = weight_average(Recipe(average=0.1), net, steps=40)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for _ in range(3):
        net(torch.rand(2, 1, 5, 5, device=DEVICE))
        for parameter in net.parameters():
            parameter.data.add_(torch.rand_like(parameter))
        average.update()
        for name, value in net.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value if value.is_floating_point() else value.clone()
    for name, value in average.net.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert net.state_dict()["1.num_batches_tracked"] == 3


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_first_weights_count_for_nothing_in_the_average_when_the_run_ends(steps):
    for name in ("fast", "best"):
        net = small_net()
        nn.init.ones_(net[0].weight)
        average = weight_average(RECIPES[name], net, steps)
        nn.init.zeros_(net[0].weight)
        for _ in range(steps):
            average.update()
        assert average.net[0].weight.max() < 1e-12


def test_the_textbook_has_no_average():
    assert weight_average(RECIPES["textbook"], small_net(), 10) is None


# ---- runs ------------------------------------------------------------------------------------------------------


def test_the_textbook_is_the_loop_written_by_hand_bit_for_bit(tmp_path):
    config = TrainConfig(
        impl="eager", epochs=2, batch_size=8, resize=32, limit_train=20, limit_test=16, device="cpu", seed=5,
        save=str(tmp_path / "net.pt"),
    )  # fmt: skip
    result = train(config)

    data = load_once(None)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = resnet18()
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
    net.to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.05), fused=True)
    training_set = Batches(
        data.train_images[:20], data.train_labels[:20], 8, device="cpu", resize=32, shuffle=True, seed=5
    )
    for epoch in result.epochs:
        total = 0.0
        for x, labels in training_set:
            loss = F.cross_entropy(net(x), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            total += loss.item() * len(x)
        assert epoch.loss == pytest.approx(total / 20, rel=1e-6)
    saved = torch.load(result.checkpoint, weights_only=True)
    assert {"raw_model"} & set(saved) == set()
    for name, value in net.state_dict().items():
        assert torch.equal(saved["model"][name], value), name


def test_a_recipe_is_the_loop_written_by_hand(tmp_path):
    """With PyTorch's own averaging of the model."""
    result = train(quick(save=str(tmp_path / "net.pt"), limit_train=16))

    data = load_once(None)
    net = preparation.net_of("resnet18", "eager", seed=0).to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    average.n_averaged += 1  # else its first update copies
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    sgd = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 5e-4}, {"params": vectors}], lr=1.0, momentum=0.9, nesterov=True
    )
    training_set = Batches(
        data.train_images[:16], data.train_labels[:16], 8, device="cpu", resize=33, shuffle=True,
        augmentation=QUICK.augmentation,
    )  # fmt: skip
    step = 0
    for _ in range(2):
        for x, labels in training_set:
            for group in sgd.param_groups:
                group["lr"] = rate(QUICK, step, 4)
            sgd.zero_grad()
            F.cross_entropy(net(x), labels, label_smoothing=0.1).backward()
            sgd.step()
            average.update_parameters(net)
            step += 1
    saved = torch.load(result.checkpoint, weights_only=True)
    for key, expected in (("raw_model", net), ("model", average.module)):
        for name, value in expected.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(saved[key][name], value, rtol=1e-3, atol=1e-4, msg=f"{key}: {name}")


def test_the_average_is_evaluated_and_saved_as_the_model(tmp_path):
    config = quick(save=str(tmp_path / "net.pt"), limit_test=100)
    result = train(config)
    saved = torch.load(config.save, weights_only=True)
    assert any(not torch.equal(value, saved["raw_model"][name]) for name, value in saved["model"].items())
    data = load_once(None)
    for block in (Residual, FusedResidual):
        net = resnet18(block=block)
        net.load_state_dict(saved["model"], strict=True)
        ((x, labels),) = Batches(data.test_images[:100], data.test_labels[:100], 100, device="cpu", resize=33)
        with torch.no_grad():
            accuracy = (net.eval()(x).argmax(1) == labels).float().mean().item()
        assert accuracy == pytest.approx(result.test_acc, abs=0.011), "but for one tie at most"


@pytest.mark.parametrize("name", ["fast", "best"])
@pytest.mark.parametrize("impl", ["eager", "fused"])
def test_a_recipe_lowers_the_loss(name, impl):
    """At a larger rate the loss of so few images rises first, and roundings decide how far."""
    config = TrainConfig(
        impl=impl, recipe=name, epochs=4, batch_size=8, lr=0.01, limit_train=24, limit_test=8, device="cpu", seed=1
    )
    losses = [epoch.loss for epoch in train(config).epochs]
    assert losses[-1] < 0.8 * losses[0]


def test_a_seed_gives_the_same_figures_again_and_another_seed_others():
    a, b, other = (train(quick(seed=seed)) for seed in (1, 1, 2))
    assert (a.loss, a.train_acc, a.test_acc) == (b.loss, b.train_acc, b.test_acc)
    assert other.loss != a.loss


def test_what_fills_no_batch_is_left_out_of_an_epoch_unless_nothing_does():
    assert train(quick(limit_train=20)).epochs[0].examples == 16
    assert train(quick(limit_train=7)).epochs[0].examples == 7


# ---- graphs and half precision ---------------------------------------------------------------------------------


def state_of(run: loop._Run) -> list[Tensor]:
    return [tensor.clone() for tensor in run._state()]


def test_replays_train_as_steps_do(tmp_path, stand_in):
    off, on = (train(quick(cuda_graph=graph, save=str(tmp_path / f"{graph}.pt"))) for graph in ("off", "on"))
    assert stand_in == [4]
    assert [e.loss for e in on.epochs] == [e.loss for e in off.epochs]
    assert on.test_acc == off.test_acc
    saved, expected = (torch.load(result.checkpoint, weights_only=True) for result in (on, off))
    for key in ("model", "raw_model"):
        for name, value in saved[key].items():
            assert torch.equal(value, expected[key][name]), f"{key}: {name}"


def test_the_warm_up_leaves_weights_momenta_averages_and_random_states_as_they_were(stand_in):
    run = begun(quick(cuda_graph="on"))
    before, random = state_of(run), torch.get_rng_state()
    run.warm_up()
    assert all(torch.equal(*pair) for pair in zip(state_of(run), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random) and run.batches.epoch == 0
    run._step(torch.arange(8))
    changed = [not torch.equal(*pair) for pair in zip(state_of(run), before, strict=True)]
    assert sum(changed) > 0.9 * len(changed), "but for what has no gradient, biases before a norm"


class NoAnswers(TorchDispatchMode):
    """Refuses what would have the host wait for the device: a tensor's value, or a size that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if "index" in func.__name__ else ()
        assert not masks, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["fast", "best"])
def test_a_step_asks_the_device_for_nothing(name):
    """Which a capture would refuse."""
    run = begun(quick(recipe=name, batch_size=2, limit_train=4))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoAnswers():
        torch.ones(1).item()
    with NoAnswers():
        run._learn(torch.arange(2))


def test_what_a_graph_reads_and_writes_stays_where_it_is(monkeypatch, stand_in):
    places = []
    learn = loop._Run._learn

    def noted(run, index):
        rates = [group["lr"] for group in run.optimizer.param_groups]
        places.append([tensor.data_ptr() for tensor in (*run._state(), *rates)])
        return learn(run, index)

    monkeypatch.setattr(loop._Run, "_learn", noted)
    train(quick(cuda_graph="on"))
    assert len(places) > 5 and all(place == places[0] for place in places)


def test_a_step_that_the_loss_scaler_skips_changes_no_weight_momentum_or_average(monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = begun(quick(dtype="float16", batch_size=2, limit_train=2))
    run._step(torch.arange(2))
    parameters = [*run.net.parameters()], [*run.average.net.parameters()]
    assert all(torch.equal(*pair) for pair in zip(*parameters, strict=True))
    assert not any(value.any() for state in run.optimizer.state.values() for value in state.values())


def test_bfloat16_follows_float32(tmp_path):
    half, single = (train(quick(dtype=dtype, lr=1e-3)) for dtype in ("bfloat16", "float32"))
    assert half.loss != single.loss
    assert half.loss == pytest.approx(single.loss, rel=0.05)


@CUDA
@pytest.mark.parametrize("impl", ["eager", "fused"])
@pytest.mark.parametrize("name", ["fast", "best"])
def test_a_graph_trains_as_steps_do_on_a_gpu(tmp_path, impl, name):
    config = TrainConfig(
        impl=impl, recipe=name, epochs=2, batch_size=32, lr=1e-3, dtype="float32", limit_train=128, limit_test=64
    )
    off, on = (
        train(dataclasses.replace(config, cuda_graph=graph, save=str(tmp_path / f"{graph}.pt")))
        for graph in ("off", "on")
    )
    assert on.cuda_graph and not off.cuda_graph
    assert [e.loss for e in on.epochs] == pytest.approx([e.loss for e in off.epochs], rel=0.01)
    saved, expected = (torch.load(result.checkpoint, weights_only=True) for result in (on, off))
    for key in ("model", "raw_model"):
        for name, value in saved[key].items():
            torch.testing.assert_close(value, expected[key][name], rtol=0.01, atol=0.01, msg=f"{key}: {name}")


@CUDA
def test_each_replay_sees_other_images():
    run = begun(TrainConfig(recipe="best", batch_size=32, limit_train=32, limit_test=8, lr=1e-30))
    run.warm_up()
    losses = []
    for _ in range(3):
        (index,) = run.batches.indices()
        losses.append(run._step(index.sort().values)[0].item())
    assert len(set(losses)) == 3


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["textbook", "fast", "best"])
def test_an_option_that_is_not_given_takes_the_recipe_s_value(name):
    config = TrainConfig(recipe=name, device="cpu")
    recipe = RECIPES[name]
    given = {k: getattr(config, k) for k in ("epochs", "batch_size", "lr", "resize", "stem")}
    assert given == {k: getattr(recipe, k) for k in given}
    assert config.dtype == "float32", "a recipe's bfloat16 is for a GPU"


def test_the_textbook_is_the_default():
    assert TrainConfig() == TrainConfig(
        recipe="textbook", epochs=10, batch_size=256, lr=0.05, resize=96, dtype="float32", stem="textbook"
    )


@CUDA
@pytest.mark.parametrize(("device", "dtype"), [("auto", "bfloat16"), ("cuda", "bfloat16"), ("cpu", "float32")])
def test_a_recipe_s_bfloat16_is_for_a_gpu_that_computes_in_it(device, dtype):
    assert TrainConfig(recipe="best", device=device).dtype == dtype


def test_that_gpu_is_the_one_that_is_named(monkeypatch):
    """An A100 is the current device, beside it is a T4, whose bfloat16 is emulated."""
    current = [0]

    @contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=(8, 7)[index]))
    names = ("auto", "cuda", "cuda:0", "cuda:1", "cuda:2")
    found = [TrainConfig(recipe="best", device=name).dtype for name in names]
    assert found == ["bfloat16", "bfloat16", "bfloat16", "float32", "float32"]


def test_an_option_overrides_the_recipe_s_value_and_json_holds_what_was_used(tmp_path):
    path = tmp_path / "figures.json"
    few = ["--device", "cpu", "--impl", "eager", "--limit-train", "16", "--limit-test", "8", "--json", str(path)]
    given = ["--epochs", "2", "--batch-size", "8", "--lr", "0.003", "--resize", "33", "--dtype", "float32"]
    assert main(["--recipe", "fast", *few, *given, "--stem", "textbook", "--save", "net.pt"]) == 0
    figures = json.loads(path.read_text())
    used = {"epochs": 2, "batch_size": 8, "lr": 0.003, "resize": 33, "dtype": "float32", "stem": "textbook"}
    assert {name: figures["config"][name] for name in used} == used
    assert figures["config"]["recipe"] == "fast"
    expected = dataclasses.asdict(dataclasses.replace(RECIPES["fast"], **used))
    assert figures["recipe"] == expected
    assert figures["train_seconds"] == pytest.approx(sum(epoch["seconds"] for epoch in figures["epochs"]))
    assert isinstance(read_net("net.pt", torch.device("cpu")).net[0], Stem)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "slow"], "--recipe: invalid choice: 'slow'"),
        (
            ["--recipe", "best", "--epochs", "1", "--limit-train", "256"],
            "--recipe best needs 2 steps or more, a last one after its warm-up: --epochs 1 and --batch-size 256 make 1",
        ),
        (["--recipe", "best", "--lr", "-1"], "--lr: expected a positive number that float32 holds, got -1.0"),
    ],
    ids=["no recipe", "too few steps", "a negative rate"],
)
def test_what_cannot_be_used_is_one_line_and_exit_status_2_before_any_work(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(loop, "_Run", None)  # nothing may get so far
    with pytest.raises(SystemExit) as exit:
        main(["--device", "cpu", "--impl", "eager", *arguments])
    assert exit.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m resnet.train: error: ") and message in line


def test_a_recipe_that_is_not_known_is_an_error_that_names_those_that_are():
    with pytest.raises(ConfigError, match="--recipe: expected one of textbook, fast, best"):
        TrainConfig(recipe="slow")
