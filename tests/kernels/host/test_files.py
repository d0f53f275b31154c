"""What is kept for a user: where, and written whole or not at all."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from resnet.kernels.host.files import write_atomically
from tests.conftest import ROOT
from tests.helpers.places import PLACES


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "figures.json"

    def write(part) -> None:
        part.write(b"half")
        part.flush()
        assert not path.exists()
        part.write(b" and half")

    write_atomically(path, write)
    assert path.read_text() == "half and half"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def fail(part) -> None:
        part.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_may_be_read_by_those_whom_the_umask_allows(tmp_path):
    path = tmp_path / "choices.json"
    before = os.umask(0o022)
    try:
        write_atomically(path, lambda part: part.write(b"{}"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["n" * 252 + ".pt", "n." + "p" * 253, "n" * 255], ids=["stem", "suffix", "no suffix"])
def test_a_name_may_be_as_long_as_names_may_be(tmp_path, name):
    write_atomically(tmp_path / name, lambda part: part.write(b"whole"))
    assert (tmp_path / name).read_bytes() == b"whole"


@pytest.mark.parametrize("there", [True, False], ids=["old", "none yet"])
def test_a_link_stays_and_the_file_that_it_names_is_replaced(tmp_path, there):
    target = tmp_path / "folder" / "target"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(Path("folder", "target"))
    write_atomically(link, lambda part: part.write(b"new"))
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("through", ["itself", "a link"])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, monkeypatch, kind, through):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it"
    PLACES[kind](path)
    before = path.lstat()
    (tmp_path / "link").symlink_to("it")
    with pytest.raises(OSError, match=f"expected a regular file, got a {kind}"):
        write_atomically(path if through == "itself" else tmp_path / "link", lambda part: part.write(b"new"))
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert {p.name for p in tmp_path.iterdir()} == {"it", "link"}


# ---- the parts of killed processes -------------------------------------------------------------------------------

WRITES = """
import sys, time
from pathlib import Path
from resnet.kernels.host.files import write_atomically

def write(part):
    part.write(b"half")
    part.flush()
    print("begun", flush=True)
    sys.stdin.read()

write_atomically(Path(sys.argv[1]), write)
"""


def writer(path: Path) -> subprocess.Popen:
    """A process amid a write, which ends with its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_killed_process_s_part_is_removed_by_the_next_write_and_a_running_one_s_is_not(tmp_path):
    other = tmp_path / ".0123456789abcdef.part.theirs"
    with writer(tmp_path / "killed") as killed, writer(tmp_path / "running") as running:
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=60)
        other.mkdir()  # of another kind: nobody's business
        write_atomically(tmp_path / "next", lambda part: part.write(b"whole"))
        (part,) = (p for p in tmp_path.glob(".*.part*") if p != other)
        assert part.read_bytes() == b"half"
        running.stdin.close()
        assert running.wait(timeout=60) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"running", "next", other.name}
    assert (tmp_path / "running").read_bytes() == b"half"
