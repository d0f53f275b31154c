"""What a training run says of itself as it goes: a log of lines of JSON, and scalars for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from resnet.commands import append_to, not_written, open_output, standard_stream, write_output

if TYPE_CHECKING:  # an extra
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """Writes lines to a file that a user has named; nowhere where the path is None.

    What was in the file is replaced when the first line comes, or added to after `go_on`.
    """

    def __init__(self, path: str | None):
        self.path = path
        self._append = False
        self._file: BinaryIO | None = None

    def go_on(self, epochs: int, step: int) -> None:
        """Add to what a run had written when it had trained so many epochs in full, and steps of the next one.

        A run that was killed may have written more since its checkpoint. That will be written again.
        """
        self._append = True
        if self.path is None or not os.path.isfile(self.path) or standard_stream(Path(self.path)) is not None:
            return
        content = Path(self.path).read_bytes()
        kept = lines_until(content, epochs, step)
        if kept != content:
            write_output(self.path, kept)

    def write(self, **figures: float) -> None:
        """A line; OutputError where it cannot be written."""
        if self.path is None:
            return
        if self._file is None:
            self._file = open_output(self.path, self._append)
        append_to(self._file, self.path, (json.dumps(figures) + "\n").encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def lines_until(content: bytes, epochs: int, step: int) -> bytes:
    """The lines without those of later steps and epochs; one that was not ended is left out."""
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return b"".join(line for line in lines if not _is_later(line, (epochs, step)))


def _is_later(line: bytes, place: tuple[int, int]) -> bool:
    """Whether a line was written after a place in a run; one that is none of a run's was not."""
    try:
        figures = json.loads(line)
        epoch, step = figures["epoch"], figures.get("step")
        return ((epoch, 0) if step is None else (epoch - 1, step)) > place
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


class Board:
    """Writes scalars for TensorBoard into a folder that a user has named; nowhere where it is None.

    They hide scalars of the same and of later steps that an earlier run has left in the folder.
    """

    def __init__(self, folder: str | None):
        self.folder = folder
        self._first = 1  # step
        self._writer: SummaryWriter | None = None

    def go_on(self, step: int) -> None:
        """Leave what a run had written in its steps until this one."""
        self._first = step + 1

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars by their tags, at a step that is counted over all epochs; OutputError where that fails."""
        if self.folder is None:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # here, since it takes seconds

                self._writer = SummaryWriter(self.folder, purge_step=self._first)
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            raise not_written(self.folder, error) from error

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # which `write` has raised before: nothing is left to be written
                self._writer.close()
