"""What a run begins with, checked against its configuration before anything is trained or written."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import nn

from resnet.commands import ConfigError, check_backend, require, require_limit
from resnet.data import FASHION_MNIST, Batches, ImageSet, ImageSpec, load
from resnet.models import BUILDERS
from resnet.ranks import ALONE, Ranks
from resnet.training.checkpoints import check_images, check_processes, check_progress, check_settings, read_checkpoint
from resnet.training.config import TrainConfig
from resnet.training.profiling import RECORDED, SKIPPED
from resnet.training.recipes import warm_up_steps

EVALUATION_BATCH = 256


def prepared(
    config: TrainConfig, device: torch.device, ranks: Ranks
) -> tuple[bool, dict[str, Any] | None, ImageSet, Batches, Batches]:
    """(whether there is a CUDA graph, the checkpoint to go on from, the images, the training and the test set)."""
    check_backend(config.impl, device)
    cuda_graph = wants_graph(config, device, ranks)
    if config.sync_batch_norm and config.impl != "fused":
        require(device.type == "cuda", "--sync-batch-norm", "--impl fused, or CUDA devices as PyTorch's has it", device)
    earlier = None if config.resume is None else read_checkpoint(config.resume, device)
    if earlier is not None:
        check_settings(config.resume, earlier["args"], config.decisive)
        check_processes(config.resume, earlier, ranks.size)
    dataset = ranks.after_first(lambda: load(config.data))
    if earlier is not None:
        check_images(config.resume, earlier, dataset.spec)
    batches, evaluation = batches_of(config, dataset, device, ranks)
    if earlier is not None:
        check_progress(config.resume, earlier, config.epochs, len(batches.images), len(batches))
    _check_steps(config, batches)
    if device.type == "cpu" and config.dtype == "float16":
        print("float16 on a CPU is emulated and may be a hundred times slower; bfloat16 is not.", file=sys.stderr)
    return cuda_graph, earlier, dataset, batches, evaluation


def net_of(
    model: str, impl: str, seed: int, stem: str = "textbook", images: ImageSpec = FASHION_MNIST
) -> nn.Sequential:
    """A net with the textbook's first weights, the same for each `impl`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = len(images.classes), images.channels
        net = BUILDERS[model, "eager"](*shape, stem=stem)
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
        if impl != "fused":
            return net
        fused = BUILDERS[model, impl](*shape, stem=stem)
        fused.load_state_dict(net.state_dict())
        return fused


def wants_graph(config: TrainConfig, device: torch.device, ranks: Ranks = ALONE) -> bool:
    """Whether steps are to be replayed as a CUDA graph. ConfigError where that is asked for and cannot be."""
    if config.cuda_graph == "on":
        require(config.impl != "compile", "--cuda-graph on", "--impl eager or fused, which it captures", config.impl)
        require(device.type == "cuda", "--cuda-graph on", "a CUDA device, which has such graphs", device)
        require(ranks.size == 1, "--cuda-graph on", "one process, whose steps wait for no other", ranks.size)
    return config.cuda_graph != "off" and config.impl != "compile" and device.type == "cuda" and ranks.size == 1


def batches_of(
    config: TrainConfig, dataset: ImageSet, device: torch.device, ranks: Ranks = ALONE
) -> tuple[Batches, Batches]:
    """The training and the test set on the device. Raises ConfigError for a limit or a batch that cannot be."""
    require_limit("--limit-train", config.limit_train, len(dataset.train_images), dataset.source)
    require_limit("--limit-test", config.limit_test, len(dataset.test_images), dataset.source)
    size = dataset.spec.size
    own = f"at least {size}, the size of the images of {dataset.source}: they are enlarged only"
    require(config.resize >= size, "--resize", own, config.resize)
    n = config.limit_train or len(dataset.train_images)
    plan = config.plan
    erased = plan.augmentation.erase if plan.augmentation else 0
    larger = f"images larger than the {erased}x{erased} pixels that it erases of each"
    require(size > erased, f"--recipe {config.recipe}", larger, f"{size}x{size}")
    # A last stage of one pixel has one value per channel in a batch of one image, which BatchNorm cannot normalise.
    one_pixel = math.ceil(config.resize / (8 if plan.stem == "small" else 32)) == 1
    if one_pixel and min(n, config.batch_size) == 1:
        raise ConfigError(
            f"--resize {config.resize} needs batches of 2 images or more: one has but one value per channel in the "
            "last stage, which BatchNorm cannot normalise; --resize 33 or more does not"
        )
    least = (2 if one_pixel else 1) * ranks.size
    require(
        min(n, config.batch_size) >= least,
        "--batch-size",
        f"{least} images or more, {least // ranks.size} for each of {ranks.size} processes",
        min(n, config.batch_size),
    )
    left = n % config.batch_size
    too_few = 0 < left < least
    if too_few and ranks.size == 1:
        print(
            f"One image is left out of each epoch: BatchNorm cannot train on it alone at --resize {config.resize}.",
            file=sys.stderr,
        )
    elif too_few:
        print(f"{left} of {n} images are left out of each epoch: too few for {ranks.size} processes.", file=sys.stderr)
    batches = Batches(
        dataset.train_images[:n],
        dataset.train_labels[:n],
        config.batch_size,
        device=device,
        resize=config.resize,
        shuffle=True,
        seed=config.seed,
        drop_last=too_few or (plan.whole_batches and n >= config.batch_size),
        augmentation=plan.augmentation,
    )
    evaluation = Batches(
        dataset.test_images[: config.limit_test],
        dataset.test_labels[: config.limit_test],
        EVALUATION_BATCH,
        device=device,
        resize=config.resize,
    )
    return batches, evaluation


def steps_of(config: TrainConfig, batches: Batches) -> int:
    return config.epochs * len(batches)


def _check_steps(config: TrainConfig, batches: Batches) -> None:
    """ConfigError where the learning rate could only rise, or a trace would have no end."""
    steps = steps_of(config, batches)
    if warm_up_steps(config.plan, steps) >= steps:
        raise ConfigError(
            f"--recipe {config.recipe} needs 2 steps or more, a last one after its warm-up: --epochs {config.epochs} "
            f"and --batch-size {config.batch_size} make {steps} of {batches.examples} images"
        )
    if config.profile is not None:
        wanted = f"{SKIPPED + RECORDED} steps or more in an epoch, of which it records {RECORDED}"
        require(len(batches) >= SKIPPED + RECORDED, "--profile", wanted, len(batches))
