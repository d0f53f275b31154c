"""The pictures of the commands. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would look for a screen
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from resnet.data import CLASSES

if TYPE_CHECKING:
    from resnet.training.result import Epoch

ROWS, COLUMNS = 5, 8  # of images
AS_IT_IS = {"parse_math": False}  # of a user's names, in which two dollars are no formula
RIGHT, WRONG = "0.35", "#c4161c"
CENTRED = {"horizontalalignment": "center", "verticalalignment": "center"}


def evaluation(
    images: Tensor, labels: Tensor, guesses: Tensor, matrix: Tensor, names: Sequence[str] = CLASSES
) -> Figure:
    """The first images, uint8 (N, S, S) or (N, S, S, 3), each with its class and guess, beside the confusion matrix."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(8, 7))
    left.suptitle("the first images: class, then guess; a wrong guess is framed", fontsize=11)
    shown = zip(range(1, ROWS * COLUMNS + 1), images, labels.tolist(), guesses.tolist())
    for place, image, label, guess in shown:
        _draw_guess(left.add_subplot(ROWS, COLUMNS, place), image, names[label], names[guess])
    right.suptitle("confusion matrix: images by class and guess", fontsize=11)
    _draw_confusion(right.subplots(), matrix, names)
    return figure


def training(epochs: Sequence[Epoch], planned: int) -> Figure:
    """Loss and accuracies by epoch, as the textbook draws them; the axis is as long as the run is to be."""
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    axes = figure.subplots()
    numbers = range(1, len(epochs) + 1)
    marker = "o" if len(epochs) == 1 else None  # one point makes no line
    for name, style, label in (
        ("loss", "-", "train loss"),
        ("train_acc", "m--", "train acc"),
        ("test_acc", "g-.", "test acc"),
    ):
        axes.plot(numbers, [getattr(epoch, name) for epoch in epochs], style, label=label, marker=marker)
    axes.set(xlabel="epoch", xlim=(1, planned) if planned > 1 else (0.5, 1.5))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid()
    axes.legend()
    return figure


def runs(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss, and training and test accuracy, by epoch of several runs, each in its colour."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for number, (name, epochs) in enumerate(curves.items()):
        numbers = range(1, len(epochs) + 1)
        style = {"color": f"C{number}", "marker": "o" if len(epochs) == 1 else None}
        loss.plot(numbers, [epoch["loss"] for epoch in epochs], label=name, **style)
        accuracy.plot(numbers, [epoch["train_acc"] for epoch in epochs], linestyle="--", **style)
        accuracy.plot(numbers, [epoch["test_acc"] for epoch in epochs], label=name, **style)
    loss.set(title="train loss", xlabel="epoch")
    loss.set_ylim(bottom=0)
    accuracy.set(title="accuracy: test; dashed: train", xlabel="epoch")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
        labelled = [line for line in axes.lines if line.get_label() in curves]
        legend = axes.legend(labelled, [f"run {number}" for number in range(len(labelled))])
        for text, line in zip(legend.get_texts(), labelled):
            text.set(text=line.get_label(), **AS_IT_IS)  # here: a label that starts with _ would be left out
    return figure


def _draw_guess(axes: Axes, image: Tensor, truth: str, guess: str) -> None:
    is_right = truth == guess
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(
        f"{truth}\n{guess}",
        fontsize=9,
        color=RIGHT if is_right else WRONG,
        weight="normal" if is_right else "bold",
        **AS_IT_IS,
    )
    axes.spines[:].set(visible=not is_right, color=WRONG, linewidth=3)


def _draw_confusion(axes: Axes, matrix: Tensor, names: Sequence[str]) -> None:
    """Counts; the shade is the part of the row, so that classes of any size compare."""
    shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).tolist()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(
        range(len(names)), names, rotation=45, horizontalalignment="right", rotation_mode="anchor", **AS_IT_IS
    )
    axes.set_yticks(range(len(names)), names, **AS_IT_IS)
    axes.tick_params(length=0)
    axes.set(xlabel="guess", ylabel="class")
    axes.spines[:].set_visible(False)
    for row, counts in enumerate(matrix.tolist()):
        for column, count in enumerate(counts):
            if count:
                colour = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, str(count), color=colour, fontsize=9, **CENTRED)
