"""What is kept for a user: where, and written whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from resnet.kernels.host.files import write_atomically


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"

    def write(part: Path) -> None:
        part.write_text("half")
        assert not path.exists()
        part.write_text("whole")

    write_atomically(path, write)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_part_has_the_suffix_of_the_file_which_some_writers_take_for_the_format(tmp_path):
    suffixes = []
    write_atomically(tmp_path / "plot.svg", lambda part: (suffixes.append(part.suffix), part.write_text("<svg/>")))
    assert suffixes == [".svg"]


def test_a_new_file_may_be_read_by_those_whom_the_umask_allows(tmp_path):
    path = tmp_path / "choices.json"
    before = os.umask(0o022)
    try:
        write_atomically(path, lambda part: part.write_text("{}"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
