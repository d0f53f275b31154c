"""The training loop: steps, looks at the loss, evaluation, checkpoints; for one process or several.

The first recipe is d2l.ai's `train_ch6`: plain SGD, Xavier-uniform weights, cross entropy, images enlarged to 96 x 96.
The others are in `resnet.training.recipes`. Loss and training accuracy are means over the last epoch, taken as it ran,
of the images as the recipe augments them; the rate counts training steps only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from resnet.commands import DTYPES, ConfigError, OutputError, find_device, write_output, write_plot
from resnet.data import FASHION_MNIST, Batches, DatasetError, ImageSpec
from resnet.graphs import Graphed
from resnet.kernels.host.command import RunError
from resnet.ranks import ALONE, Ranks
from resnet.training.checkpoints import FORMAT, another_net
from resnet.training.config import TrainConfig
from resnet.training.interrupts import Interrupt, deferred_interrupt
from resnet.training.metrics import Board, Log
from resnet.training.preparation import net_of, prepared, steps_of
from resnet.training.profiling import Trace
from resnet.training.recipes import optimizer, rate, weight_average
from resnet.training.result import Epoch, TrainResult

T = TypeVar("T")

_LOOK_SECONDS = 0.5  # between two looks at the losses; each makes a GPU's queue run empty


class NonFiniteError(RunError, ArithmeticError):
    """The loss or the weights became infinite or NaN; the message names the epoch and the step."""


class UnfinishedError(OutputError):
    """A run ended where a file could not be written; the message names it and where the weights are.

    `result` has the epochs until then.
    """

    def __init__(self, message: str, result: TrainResult):
        super().__init__(message)
        self.result = result


def train(config: TrainConfig) -> TrainResult:
    """Trains a net as `config` says, with a progress bar per epoch on stderr.

    The same seed gives the same order of images everywhere, and a model the same first weights for every `impl`.

    The checkpoint is a dictionary for `torch.load`: `model` (a state_dict for that net of either block),
    `optimizer`, `epoch` (epochs trained in full), `step` (steps of the next one), `images` (an ImageSpec),
    `train_images` (how many) and `args`. It is replaced after every epoch, never by one with non-finite weights.
    Ctrl-C ends the run after the step at hand and writes it, under a name of its own in the current folder where
    `config.save` has none; a second Ctrl-C raises KeyboardInterrupt at once.
    SIGTERM and SIGHUP do as Ctrl-C does; a second one does what it did before.

    In several processes, as torchrun starts them, each takes its share of every batch and of the test set; figures are
    of all. The first process alone writes files, and a signal to one of them is one to all. What cannot be used, or
    fails, is raised in each of them.

    Raises:
        ConfigError: the device is absent, the backend cannot run on it, a CUDA graph cannot be had, a limit exceeds the
            set, a batch of one image cannot be normalised, the recipe would erase whole images, or the steps are too
            few for its warm-up or a trace. Or the checkpoint to go on from does not fit.
        DatasetError: see `resnet.data.load`.
        NonFiniteError: the loss or the weights are no longer finite. The last checkpoint is left as it was.
        UnfinishedError: a checkpoint, the log, the plot, the trace or a scalar cannot be written. What was there before
            is left as it was.
    """
    ranks = Ranks.of_environment()
    if ranks.rank:
        config = dataclasses.replace(config, **dict.fromkeys(_WRITTEN))
    device = find_device(config.device, ranks)
    with ranks.joined(device):
        return _train(config, device, ranks)


_WRITTEN = ("save", "json", "log", "log_every", "tensorboard", "profile", "plot")  # by the first process


def _train(config: TrainConfig, device: torch.device, ranks: Ranks) -> TrainResult:
    cuda_graph, earlier, dataset, batches, evaluation = ranks.alike(
        lambda: prepared(config, device, ranks), ConfigError, DatasetError
    )
    with (
        deferred_interrupt() as interrupt,
        contextlib.closing(
            _Run(config, device, cuda_graph, batches, evaluation, interrupt, dataset.spec, ranks)
        ) as run,
    ):
        if earlier is not None:
            ranks.alike(lambda: run.go_on(earlier), ConfigError, OutputError)
        warm_up_seconds = run.warm_up()
        epochs = run.history
        checkpoint = None
        while len(epochs) < config.epochs and not run.stops() and run.epoch():
            checkpoint = run.save_epoch() or checkpoint
        interrupted = run.failure is None and len(epochs) < config.epochs
        if (interrupted or run.failure is not None) and run.trained:
            checkpoint = run.save_somewhere()
        elif checkpoint is None and config.save is not None and run.trained:  # resumed when all was trained
            checkpoint = run.save_epoch()
    result = TrainResult(
        config=config,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        processes=ranks.size,
        cuda_graph=cuda_graph,
        data=dataset.source,
        warm_up_seconds=warm_up_seconds,
        epochs=tuple(epochs),
        interrupted=interrupted,
        checkpoint=checkpoint,
        signal=signal.Signals(interrupt.number).name if interrupted else None,
    )
    if run.failure is not None:
        where = "" if checkpoint is None else f"; the weights are in {checkpoint}"
        raise UnfinishedError(f"{run.failure}{where}", result)
    return result


class _Bar(tqdm):
    """A progress bar that ends where stderr takes no more, as a pipe whose reader Ctrl-C ended: the run goes on."""

    def display(self, *args, **kwargs):
        try:
            return super().display(*args, **kwargs)
        except OSError:
            self.disable = True

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


@dataclasses.dataclass
class _Tally:
    """What an epoch's steps have given so far; the tensors are on the device."""

    losses: Tensor  # of each step
    sizes: Tensor
    correct: Tensor
    seen: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, steps: int, device: torch.device) -> _Tally:
        losses, sizes = torch.zeros(2, steps, device=device)
        return cls(losses, sizes, torch.zeros((), dtype=torch.int64, device=device))

    def loss(self) -> float:
        return ((self.losses * self.sizes).sum() / self.seen).item()

    def accuracy(self) -> float:
        return self.correct.item() / self.seen

    def figures(self) -> str:
        rate = f"{self.seen / self.seconds:.1f} examples/sec"
        return f"loss {self.loss():.3f}, train acc {self.accuracy():.3f}, {rate}"


class _Run:
    """The net, its optimizer and the data of one run."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        cuda_graph: bool,
        batches: Batches,
        evaluation: Batches,
        interrupt: Interrupt,
        images: ImageSpec = FASHION_MNIST,
        ranks: Ranks = ALONE,
    ):
        self.config = config
        self.device = device
        self.cuda_graph = cuda_graph
        self.batches = batches
        self.evaluation = evaluation
        self.interrupt = interrupt
        self.images = images
        self.ranks = ranks
        self.failure: OutputError | None = None  # the first file that could not be written
        self.log = Log(config.log)
        self.board = Board(config.tensorboard)
        self.trace = Trace(config.profile, device)
        self.epochs = 0  # trained in full
        self.step = 0  # steps of the next one
        self.history: list[Epoch] = []  # trained in full and evaluated
        self.tally = _Tally.of(len(batches), device)
        self.plan = config.plan
        self.steps = steps_of(config, batches)
        net = net_of(config.model, config.impl, config.seed, self.plan.stem, images)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.forward = ranks.parallel(self.net, device)
        if config.sync_batch_norm:
            # Now: DistributedDataParallel takes none on a CPU, where PyTorch's own do not run and fused ones do.
            nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        if config.impl == "compile":
            # Two shapes of batches at most: one graph for each is quicker than one for all.
            self.forward = torch.compile(self.forward, dynamic=False)
        self.optimizer = optimizer(self.plan, self.net)
        self.average = weight_average(self.plan, self.net, self.steps)
        self.evaluated = self.net if self.average is None else self.average.net
        # float16 alone needs its loss scaled: the others have float32's range of exponents.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
        self.graph: Graphed | None = None  # of a whole batch's step, once that is captured

    def close(self) -> None:
        self.log.close()
        self.board.close()
        self.trace.close()

    @property
    def trained(self) -> bool:
        """Whether there is anything to save: first weights should not replace somebody's checkpoint."""
        return self.epochs + self.step > 0

    def warm_up(self) -> float:
        """Compiles, lets libraries choose their algorithms and captures the graph, outside the clock; seconds taken.

        A step or more per shape of batch; weights, statistics, momenta and the scale are afterwards what they were.
        """
        if self.device.type == "cpu" and self.config.impl != "compile" and not self.cuda_graph:
            return 0.0  # nothing to choose or compile, and a step takes long
        print("warming up: compilation and choice of algorithms, not counted in examples/sec", file=sys.stderr)
        start = self._clock()
        state = self._state()
        before = [tensor.clone() for tensor in state]
        scale = self.scaler.state_dict()
        self.net.train()
        n, size = self.batches.examples, self.batches.batch_size
        whole, last = min(n, size), n % size or size
        first = torch.arange(whole, device=self.device)
        for length in sorted({whole, last}):
            self._learn(first[:length])
        self.optimizer.zero_grad()
        if self.cuda_graph:
            self.graph = Graphed(self._learn, first)
        torch._foreach_copy_(state, before)  # in place, as all that a graph reads has to stay where it is
        self.scaler.load_state_dict(scale)
        return self._clock() - start

    def _state(self) -> list[Tensor]:
        """What a step writes: weights, statistics, momenta, averages."""
        nets = {id(net): net for net in (self.net, self.evaluated)}
        momenta = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for net in nets.values() for value in net.state_dict().values()] + momenta

    def epoch(self) -> bool:
        """Trains for the rest of an epoch, evaluates and notes its figures; False where Ctrl-C came before the end."""
        steps = len(self.batches)
        if self.step == 0:
            self.tally = _Tally.of(steps, self.device)
        tally = self.tally
        self.net.train()
        self.batches.epoch = self.epochs
        checked = self.step
        with _Bar(
            total=self.batches.examples,
            initial=tally.seen,
            desc=f"epoch {self.epochs + 1}/{self.config.epochs}",
            unit="img",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        ) as bar:
            looked = self._clock()
            start = looked - tally.seconds
            correct = torch.zeros_like(tally.correct)  # since the last look
            for index in itertools.islice(self.batches.indices(), self.step, None):
                loss, right = self._step(index)
                tally.losses[self.step] = loss
                tally.sizes[self.step] = len(index)
                correct += right
                self.step += 1
                tally.seen += len(index)
                self._write(self.trace.step)
                bar.update(len(index))
                look = self.step == steps or time.perf_counter() - looked >= _LOOK_SECONDS
                look, stop = self._agree(look)
                if look:
                    self.ranks.sum_(tally.losses[checked : self.step], correct)
                    tally.correct += correct
                    correct.zero_()
                    _check_losses(tally.losses[checked : self.step], self.epochs + 1, checked + 1)
                    self._write(self._log_steps, checked)
                    checked = self.step
                    tally.seconds = (looked := self._clock()) - start
                    bar.set_postfix_str(tally.figures())
                if stop and self.step < steps:
                    return False
            self.ranks.alike(self._check_weights, NonFiniteError)
            self.epochs, self.step = self.epochs + 1, 0
            test_acc = self._accuracy()
            if test_acc is None:
                return False
            bar.set_postfix_str(f"{tally.figures()}, test acc {test_acc:.3f}")
        epoch = Epoch(tally.loss(), tally.accuracy(), test_acc, tally.seen, tally.seconds)
        self.history.append(epoch)
        self._write(self._log_epoch, epoch)
        return True

    def stops(self) -> bool:
        """Whether a signal came to any process, or a file could not be written."""
        return self._agree(False)[1]

    def _agree(self, look: bool) -> tuple[bool, bool]:
        """(whether any process wants to look at its figures, whether any has to stop, which is a look too)."""
        look, number, failed = self.ranks.highest(look, self.interrupt.number, self.failure is not None)
        if number and not self.interrupt.is_set():
            self.interrupt.number = number
            self.interrupt.set()
        stop = bool(number or failed)
        return look or stop, stop

    def _write(self, write: Callable[..., T], *args: object) -> T | None:
        """What `write` returns; None where a file cannot be written, which ends the run after the step at hand."""
        try:
            return write(*args)
        except OutputError as error:
            self.failure = self.failure or error
            return None

    def _log_epoch(self, epoch: Epoch) -> None:
        self.log.write(
            epoch=self.epochs,
            loss=epoch.loss,
            train_acc=epoch.train_acc,
            test_acc=epoch.test_acc,
            seconds=epoch.seconds,
            lr=self._rate(0),
        )
        scalars = {
            "loss": epoch.loss,
            "accuracy/train": epoch.train_acc,
            "accuracy/test": epoch.test_acc,
            "examples per sec": epoch.examples / epoch.seconds,
        }
        self.board.write(self._taken(0), scalars)

    def _log_steps(self, logged: int) -> None:
        """A line for each of `config.log_every` steps of the epoch, after those that were looked at before."""
        every = self.config.log_every
        if every is None:
            return
        for step in range(logged - logged % every + every, self.step + 1, every):
            loss = self.tally.losses[step - 1].item()
            self.log.write(epoch=self.epochs + 1, step=step, loss=loss, lr=self._rate(step))
            self.board.write(self._taken(step), {"steps/loss": loss, "steps/lr": self._rate(step)})

    def _taken(self, step: int) -> int:
        """A step of the epoch, counted from the first one of the run; 0 is the last one of the epoch before."""
        return self.epochs * len(self.batches) + step

    def _rate(self, step: int) -> float:
        """The learning rate of a step of the epoch, counted from 1; 0 is the last one of the epoch before."""
        return rate(self.plan, self._taken(step) - 1, self.steps)

    def save_epoch(self) -> str | None:
        """Writes what is asked for after an epoch; the checkpoint's path where it was written."""
        saved = None if self.config.save is None else self._write(self.save, self.config.save)
        self._write(self.plot)
        return saved

    def plot(self) -> None:
        """Draws the epochs so far, where that is asked for."""
        if self.config.plot is not None and self.history:
            from resnet import plots  # here, since it needs matplotlib, which the rest does without

            write_plot(self.config.plot, plots.training(self.history, self.config.epochs))

    def save(self, path: str) -> str:
        """Writes the checkpoint, whole or not at all; its path."""
        self._check_weights()
        # `model` is what was evaluated. Where that is an average, training goes on from `raw_model`.
        raw = {} if self.average is None else {"raw_model": self.net.state_dict()}
        checkpoint = {
            "model": self.evaluated.state_dict(),
            **raw,
            "format": FORMAT,
            "images": dataclasses.asdict(self.images),
            "train_images": len(self.batches.images),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epochs,
            "step": self.step,
            "tally": vars(self.tally),
            "processes": self.ranks.size,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "args": dataclasses.asdict(self.config),
        }
        content = io.BytesIO()  # torch.save's own errors name neither the file nor the reason
        torch.save(checkpoint, content)
        write_output(path, content.getvalue())
        return str(path)

    def save_somewhere(self) -> str | None:
        """Writes the checkpoint where that was asked for, or in another place; its path, None where neither can be."""
        if self.ranks.rank:
            return None
        paths = (self.config.save, *_unused_paths(self.config))
        return next((path for path in paths if path is not None and self._write(self.save, path)), None)

    def go_on(self, checkpoint: dict[str, Any]) -> None:
        """Be where the run was that saved the checkpoint. ConfigError where its weights are of another net."""
        try:
            self.net.load_state_dict(checkpoint["model" if self.average is None else "raw_model"])
            self.evaluated.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError):  # or no state of a net at all
            raise another_net(self.config.resume) from None
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.tally = _Tally(**checkpoint["tally"])
        self.history.extend(Epoch(**figures) for figures in checkpoint["history"])
        self.epochs, self.step = checkpoint["epoch"], checkpoint["step"]
        if self.epochs > len(self.history):  # Ctrl-C came in its evaluation, which is all that it lacks
            self.epochs, self.step = len(self.history), len(self.batches)
        self.log.go_on(self.epochs, self.step)
        self.board.go_on(self._taken(self.step))
        self.plot()

    def _step(self, index: Tensor) -> tuple[Tensor, ...]:
        """`_learn` at the step's learning rate, replayed where it was captured for so many images."""
        if self.plan.warm_up:
            now = self._rate(self.step + 1)
            for group in self.optimizer.param_groups:
                group["lr"].fill_(now)
        if self.graph is None or index.shape != self.graph.shape:
            return self._learn(index)
        return self.graph(index)

    def _learn(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """One step on the images at `index`: (mean loss, how many were named right), on the device.

        In one of several processes both are its share's part of a sum over all.
        """
        share = self.ranks.share(index)
        x, labels = self.batches.draw(share)
        loss, logits = self._loss(self.forward, x, labels)
        self.optimizer.zero_grad()
        differentiated = loss
        if self.ranks.size > 1:
            loss = loss * (len(share) / len(index))
            differentiated = loss * self.ranks.size  # since gradients are averaged
        self.scaler.scale(differentiated).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def _loss(self, forward: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, logits)."""
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(x)
            return F.cross_entropy(logits, labels, label_smoothing=self.plan.label_smoothing), logits

    def _accuracy(self) -> float | None:
        """The fraction of the test images that are named right; None where Ctrl-C came in between."""
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.ranks.take_first(self.evaluated.buffers())
        self.evaluated.eval()
        with torch.no_grad():
            for index in self.evaluation.indices():
                if self.stops():
                    return None
                share = self.ranks.share(index)
                if not len(share):
                    continue
                x, labels = self.evaluation.draw(share)
                # Not the compiled net: another two graphs would take longer to make than they save.
                correct += (self._loss(self.evaluated, x, labels)[1].argmax(1) == labels).sum()
        self.ranks.sum_(correct)
        return correct.item() / self.evaluation.examples

    def _check_weights(self) -> None:
        """NonFiniteError for infinite or NaN weights, which the loss does not show: it is of those before the step."""
        values = [v for v in self.net.state_dict().values() if v.is_floating_point()]
        if not torch.stack([v.isfinite().all() for v in values]).all():
            epoch, step = (self.epochs + 1, self.step) if self.step else (self.epochs, len(self.batches))
            raise NonFiniteError(f"non-finite weights after epoch {epoch}, step {step}; {_ADVICE}")

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_ADVICE = "a smaller --lr may help"


def _check_losses(losses: Tensor, epoch: int, first_step: int) -> None:
    bad = losses.isfinite().logical_not_().nonzero()
    if len(bad):
        step = bad[0].item()
        raise NonFiniteError(f"non-finite loss ({losses[step]}) at epoch {epoch}, step {first_step + step}; {_ADVICE}")


def _unused_paths(config: TrainConfig) -> list[str]:
    """A checkpoint's paths that exist not yet, in the current folder and in the temporary one, where there are such."""
    name = f"{config.model}-{config.impl}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.pt"
    paths = []
    for folder in (os.getcwd, tempfile.gettempdir):
        with contextlib.suppress(OSError):  # it was removed while the run went
            paths.append(os.path.join(folder(), name))
    return paths
