"""What the commands share: the files that a user names, and errors and signals as lines."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from resnet.commands import ConfigError, OutputError, check_outputs, write_output
from resnet.kernels.host.command import Parser, RunError, one_line, run
from resnet.training.interrupts import deferred_interrupt
from tests.conftest import ROOT
from tests.helpers.checkpoints import as_fused, changed, save_untrained
from tests.helpers.places import PLACES

# ---- files that a user names -------------------------------------------------------------------------------------


def _hard_link() -> None:
    Path("a").touch()
    os.link("a", "b")


ONE_FILE = {
    "one name": ("a", "a", lambda: None),
    "a dot": ("a", "./a", lambda: None),
    "the folder's whole name": ("a", lambda: os.path.abspath("a"), lambda: None),
    "a link": ("a", "b", lambda: os.symlink("a", "b")),
    "a link to what is there": ("a", "b", lambda: (Path("a").touch(), os.symlink("a", "b"))),
    "a linked folder": ("f/a", "g/a", lambda: (os.mkdir("f"), os.symlink("f", "g"))),
    "a hard link": ("a", "b", _hard_link),
    "one pipe": ("a", "a", lambda: os.mkfifo("a")),
}


@pytest.mark.parametrize("case", ONE_FILE)
def test_two_outputs_in_one_file_are_refused(case):
    first, second, prepare = ONE_FILE[case]
    prepare()
    second = second() if callable(second) else second
    with pytest.raises(ConfigError, match=r"^--json: expected another file than that of --save, got "):
        check_outputs({"--save": first, "--json": second})


@pytest.mark.parametrize("second", ["b", "f/a", None, "/dev/null"])
def test_outputs_in_files_of_their_own_are_accepted(second):
    os.mkdir("f")
    Path("a").touch()
    check_outputs({"--save": "a", "--json": second})
    check_outputs({"--save": "/dev/null", "--json": second})


CANNOT_BE_WRITTEN = {
    "a folder": (".", "a file's path, got the folder ."),
    "no folder": ("nowhere/x", "a path in an existing folder, got nowhere/x"),
    "in a file": ("file/x", "a path in an existing folder, got file/x"),
    "a link into no folder": ("astray", "a path in an existing folder, got astray"),
    "a circle of links": ("circle", "a file's path, got circle"),
    "a long name": ("n" * 256, "a file's path, got nnn.*File name too long"),
    "a NUL": ("n\0l", r"a file's path, got n\0l \((stat: )?embedded null"),
    "a socket": ("socket", "a file's path, got the socket socket"),
}


@pytest.mark.parametrize("case", CANNOT_BE_WRITTEN)
def test_a_path_that_cannot_be_written_is_refused(tmp_path, case):
    Path("file").touch()
    os.symlink("circle", "circle")
    os.symlink("nowhere/x", "astray")
    PLACES["socket"](tmp_path / "socket")
    path, message = CANNOT_BE_WRITTEN[case]
    with pytest.raises(ConfigError, match=f"^--save: expected {message}"):
        check_outputs({"--save": path})


@pytest.mark.parametrize("through", ["pipe", "link"])
def test_a_pipe_is_written_to_and_stays(through):
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    received = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_bytes()))
    reader.start()
    check_outputs({"--json": through})
    write_output(through, b"figures")
    reader.join(timeout=60)
    assert received == [b"figures"] and stat.S_ISFIFO(os.stat("pipe").st_mode) and os.path.islink("link")


def test_a_device_is_written_to_and_stays(tmp_path):
    PLACES["character device"](tmp_path / "null")
    check_outputs({"--json": "null"})
    write_output("null", b"figures")
    assert stat.S_ISCHR(os.lstat("null").st_mode)
    assert os.listdir() == ["null"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file():
    with pytest.raises(OutputError, match=r"^/dev/full: cannot be written \(No space left on device\)$"):
        write_output("/dev/full", b"figures")
    assert stat.S_ISCHR(os.lstat("/dev/full").st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="this system has no /dev/stdout")
@pytest.mark.parametrize("target", ["/dev/stdout", "out"])
def test_where_standard_output_goes_what_is_written_comes_between_what_is_printed(target):
    """A file in its place would lose what was printed, as one that is opened anew would."""
    program = f"from resnet.commands import write_output as w; print('one'); w({target!r}, b'two\\n'); print('three')"
    with open("out", "wb") as out:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, env=environment)
    assert Path("out").read_text() == "one\ntwo\nthree\n"


# ---- errors and signals ------------------------------------------------------------------------------------------


def failing(error: BaseException):
    def work() -> int:
        raise error

    return work


PARSER = Parser(prog="python -m it")


@pytest.mark.parametrize("error", [RunError("no end"), OSError("no end")])
def test_what_goes_wrong_on_the_way_is_a_line_and_status_1(error, capsys):
    assert run(PARSER, failing(error)) == 1
    assert capsys.readouterr().err == "python -m it: error: no end\n"


def test_too_little_memory_of_the_host_is_a_line_and_status_1(capsys):
    assert run(PARSER, lambda: torch.empty(2**60).dim()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m it: error: too little memory: you tried to allocate 4611686018427387904 bytes.")


@pytest.mark.parametrize("error", [ConfigError("--x: no\nsuch\x1b"), KeyError("--x: no\nsuch\x1b")])
def test_what_cannot_be_used_is_a_line_and_status_2(error, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(PARSER, failing(error), (KeyError,))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "no\\nsuch\\x1b" in err.replace("\\\\", "\\")


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(PARSER, lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="shape"):
        run(PARSER, lambda: torch.ones(2).view(3))


def test_a_line_keeps_what_can_be_printed():
    assert one_line("~/ä b/x.pt") == "~/ä b/x.pt"
    assert one_line("a\nb\0\udcff") == r"a\nb\x00\udcff"


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_that_ends_it_is_a_line_and_the_shell_s_status(name, status, capsys):
    number = getattr(signal, name)
    usual = signal.signal(number, signal.SIG_DFL)
    try:
        assert run(PARSER, lambda: signal.raise_signal(number)) == status
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, usual)
    assert capsys.readouterr().err.startswith("interrupted")


def test_a_hangup_that_is_ignored_stays_so():
    """As `nohup` has it."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(PARSER, lambda: signal.raise_signal(signal.SIGHUP) or 7) == 7
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_ctrl_c_that_is_ignored_leaves_a_run_as_it_is():
    """As a script's `&` has it."""
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.is_set()
    finally:
        signal.signal(signal.SIGINT, usual)


COMMANDS = (
    "resnet.train",
    "resnet.curves",
    "resnet.evaluate",
    "resnet.predict",
    "resnet.tune",
    "resnet.kernels.tuning",
    "benchmarks.compare",
    "benchmarks.gpu_check",
    "benchmarks.history",
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_setting_in_the_environment_ends_each_command_with_one_line(command):
    done = python("-m", command, FUSED_RESIDUAL_BACKEND="cuda")
    expected = "FUSED_RESIDUAL_BACKEND: expected one of 'auto', 'triton', 'torch', got 'cuda'"
    assert (done.returncode, done.stderr) == (2, f"python -m {command}: error: {expected}\n")


@pytest.mark.parametrize(
    ("variable", "command"),
    [("FUSED_RESIDUAL_CONV", "resnet.train"), ("FUSED_RESIDUAL_TUNING", "resnet.kernels.tuning")],
)
def test_so_does_each_setting(variable, command):
    done = python("-m", command, "path", **{variable: "no"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"python -m {command}: error: {variable}: expected ")


@pytest.mark.parametrize(
    "arguments",
    [["resnet.train", "--log", "log"], ["resnet.evaluate", "net.pt"], ["resnet.predict", "net.pt", "a.png"]],
    ids=["train", "evaluate", "predict"],
)
def test_a_backend_that_cannot_run_is_one_line_before_any_work(arguments):
    changed(save_untrained(Path("net.pt")), Path("net.pt"), as_fused)
    Path("log").write_text("of an earlier run")
    environment = {"FUSED_RESIDUAL_BACKEND": "triton", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", *arguments, "--device", "cpu", **environment)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"python -m {arguments[0]}: error: backend 'triton' needs a GPU that Triton supports")
    assert Path("log").read_text() == "of an earlier run"


def test_another_program_gets_it_as_an_exception():
    program = "try:\n    import resnet\nexcept ValueError as error:\n    print(error)"
    assert python("-c", program, FUSED_RESIDUAL_BACKEND="cuda").stdout.startswith("FUSED_RESIDUAL_BACKEND: expected ")


def test_an_output_that_takes_no_more_is_a_line():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "resnet.kernels.tuning", "path"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Broken pipe" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_standard_stream_that_is_closed_from_the_start_takes_what_is_written(closed, tmp_path):
    """Python has None for it: what is printed to that goes elsewhere, and a progress bar stumbles over it."""
    code = (
        "import sys; from resnet.kernels.host.command import Parser, put, run, say; from tqdm import tqdm; "
        "sys.exit(run(Parser(), lambda: put('out') or say('err') or len(list(tqdm([1, 2, 3])))))"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stdout == ("" if closed.startswith(">") else "out\n")
    assert done.stderr.startswith("err" if closed == ">&-" else "") and bool(done.stderr) == (closed == ">&-")


@pytest.mark.parametrize("work", ["'0'", "signal.raise_signal(signal.SIGINT)"], ids=["done", "interrupted"])
def test_a_standard_error_that_takes_no_more_leaves_the_status_as_it_is(work):
    """What is left in it, as half a line of a progress bar, would make Python's own status 120."""
    code = (
        "import signal, sys; from resnet.kernels.host.command import Parser, run; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in a shell's background job
        f"sys.exit(run(Parser(), lambda: sys.stderr.write('half a line') and int({work})))"
    )
    read, write = os.pipe()
    os.close(read)
    kept = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is not written at once
    status = subprocess.run([sys.executable, "-c", code], stderr=write, cwd=ROOT, env=kept, timeout=60).returncode
    os.close(write)
    assert status == (0 if work == "'0'" else 130)
