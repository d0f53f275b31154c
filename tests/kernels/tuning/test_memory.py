"""`kernels.tuning.memory`: what is timed, what is remembered, and what a file that is wrong, shared or missing does.

The candidates differ by what they wait; a GPU is timed by its own events, the CPU here by the wall clock.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from resnet.kernels.host import launcher
from resnet.kernels.host.files import cache_folder
from resnet.kernels.tuning import __main__ as tuning_command
from resnet.kernels.tuning import choice, timing
from resnet.kernels.tuning import memory as process_memory
from resnet.kernels.tuning.memory import Choices, hash_kernels
from tests.conftest import DEVICE, ROOT
from tests.helpers.places import PLACES

KEY = ("forward", 64, 64, torch.float16, ("stats", True))


waited = [0.0]  # milliseconds, by all candidates: a machine that is busy makes none of them slower


def clock_of_waits(runs, device) -> list[float]:
    times = []
    for run in runs:
        start = waited[0]
        run()
        times.append(waited[0] - start)
    return times


@pytest.fixture(autouse=True)
def timed_on_the_cpu_too(monkeypatch):
    monkeypatch.setitem(timing.CLOCKS, "cpu", clock_of_waits)
    monkeypatch.setattr(timing, "_BUDGET", 10.0)


class Waiting:
    """Candidates that take a while each, and count how often they ran."""

    def __init__(self, **milliseconds: float):
        self.count = dict.fromkeys(milliseconds, 0)
        self.runs = {name: lambda n=name, t=time: self._run(n, t) for name, time in milliseconds.items()}

    def _run(self, name: str, milliseconds: float) -> None:
        self.count[name] += 1
        if DEVICE.type == "cuda":
            torch.cuda._sleep(int(milliseconds * 1e6))
        else:
            waited[0] += milliseconds


def slow_and_fast() -> Waiting:
    return Waiting(slow=4.0, fast=0.0)


def failing(error: Exception):
    def run():
        raise error

    return run


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(200_000, 101_376, "shared memory")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "choices.json"


# ---- the choice ------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_whatever_the_order(path):
    assert Choices(path).choose(KEY, slow_and_fast().runs, DEVICE) == "fast"
    assert Choices(None).choose(KEY, Waiting(fast=0.0, slow=4.0).runs, DEVICE) == "fast"


def test_each_candidate_runs_several_times_and_later_calls_run_none(path):
    memory, waiting = Choices(path), slow_and_fast()
    memory.choose(KEY, waiting.runs, DEVICE)
    before = dict(waiting.count)
    assert min(before.values()) > 5 and len(set(before.values())) == 1
    assert memory.choose(KEY, waiting.runs, DEVICE) == "fast"
    assert waiting.count == before


def test_keys_are_apart(path):
    memory = Choices(path)
    memory.choose((*KEY, 1), slow_and_fast().runs, DEVICE)
    assert memory.choose((*KEY, 2), Waiting(slow=0.0, fast=4.0).runs, DEVICE) == "slow"


def test_a_choice_of_this_process_is_looked_up_without_the_file(path):
    memory = Choices(path)
    memory.choose(KEY, slow_and_fast().runs, DEVICE)
    path.unlink()
    path.parent.rmdir()
    memory.path = None  # a use of it would fail
    assert memory.remembered(KEY, DEVICE) == memory.choose(KEY, {}, DEVICE) == "fast"


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_with_deterministic_algorithms_nothing_is_timed_and_the_first_that_runs_is_taken(path):
    waiting = slow_and_fast()
    runs = {"large": failing(out_of_resources()), **waiting.runs}
    memory = Choices(path)
    with deterministic_algorithms():
        assert memory.choose(KEY, runs, DEVICE) == memory.remembered(KEY, DEVICE) == "slow"
    assert waiting.count == {"slow": 1, "fast": 0} and not path.exists()


def test_deterministic_algorithms_set_aside_what_was_timed_and_leave_it_for_later(path):
    """In this process and in the file."""
    memory, waiting = Choices(path), slow_and_fast()
    memory.choose(KEY, waiting.runs, DEVICE)
    with deterministic_algorithms():
        for choices in (memory, Choices(path)):
            assert choices.remembered(KEY, DEVICE) is None
            assert choices.choose(KEY, waiting.runs, DEVICE) == "slow"
    assert memory.remembered(KEY, DEVICE) == "fast"


def test_deterministic_algorithms_make_another_state_of_choices():
    """So that a recorded launch, with its tile, is not replayed."""
    before = choice.state()
    with deterministic_algorithms():
        assert choice.state() != before
    assert choice.state() == before


def test_nothing_is_remembered_of_a_key_that_was_not_asked_for(path):
    assert Choices(path).remembered(KEY, DEVICE) is None


def test_of_many_candidates_the_first_that_run_are_timed(path):
    waiting = Waiting(first=4.0, second=0.0, third=0.0)
    runs = {"large": failing(out_of_resources()), **waiting.runs}
    assert Choices(path).choose(KEY, runs, DEVICE, timed=2) == "second"
    assert waiting.count["third"] == 0


def test_a_remembered_choice_counts_where_it_would_not_be_timed_again(path):
    waiting = Waiting(first=4.0, second=4.0, third=0.0)
    assert Choices(path).choose(KEY, waiting.runs, DEVICE) == "third"
    before = dict(waiting.count)
    assert Choices(path).choose(KEY, waiting.runs, DEVICE, timed=2) == "third"
    assert waiting.count == before


def test_on_a_device_without_a_clock_the_first_is_taken_and_none_runs(path, monkeypatch):
    monkeypatch.delitem(timing.CLOCKS, "cpu")
    waiting = slow_and_fast()
    assert Choices(path).choose(KEY, waiting.runs, torch.device("cpu")) == "slow"
    assert not any(waiting.count.values()) and not path.exists()


def test_threads_that_ask_at_once_time_once(path):
    memory, waiting, names = Choices(path), slow_and_fast(), []
    ask = lambda: names.append(memory.choose(KEY, waiting.runs, DEVICE))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = slow_and_fast()
    Choices(None).choose(KEY, alone.runs, DEVICE)
    assert names == ["fast"] * 4
    assert waiting.count["slow"] < 2 * alone.count["slow"]


def test_a_candidate_may_choose_itself(path):
    memory = Choices(path)

    def outer():
        memory.choose("inner", slow_and_fast().runs, DEVICE)

    memory.choose(KEY, {"outer": outer, "slow": Waiting(slow=4.0).runs["slow"]}, DEVICE)
    assert memory.remembered("inner", DEVICE) == "fast"


def test_those_that_are_timed_are_compiled_together_before_the_first_one_runs(path):
    calls = []
    runs = {name: lambda name=name: calls.append((name, launcher.compiles_only())) for name in ("a", "b", "c")}
    Choices(path).choose(KEY, runs, DEVICE, timed=2)
    assert calls[:2] == [("a", True), ("b", True)]
    assert set(calls[2:]) == {("a", False), ("b", False)}


def test_a_choice_within_a_candidate_is_compiled_with_it_and_made_later(path):
    memory, calls = Choices(path), []

    def outer():
        inner = {name: lambda name=name: calls.append((name, launcher.compiles_only())) for name in ("a", "b")}
        memory.choose("inner", inner, DEVICE)
        return calls.append(memory.remembered("inner", DEVICE))

    memory.choose(KEY, {"outer": outer, "other": int}, DEVICE)
    assert calls[:3] == [("a", True), ("b", True), None]
    assert memory.remembered("inner", DEVICE) in ("a", "b")


# ---- candidates that cannot run ----------------------------------------------------------------------------------


def test_a_candidate_without_the_shared_memory_is_left_out(path):
    runs = {"large": failing(out_of_resources()), **Waiting(small=0.0).runs}
    assert Choices(path).choose(KEY, runs, DEVICE) == "small"


def test_a_candidate_that_does_not_compile_is_left_out(path):
    from triton.compiler.errors import CompilationError

    error = CompilationError("def kernel(): ...", None, "unsupported")
    runs = {"unsupported": failing(error), **slow_and_fast().runs}
    assert Choices(path).choose(KEY, runs, DEVICE) == "fast"


def test_with_none_left_the_error_names_key_and_device(path):
    runs = {"large": failing(out_of_resources()), "larger": failing(out_of_resources())}
    with pytest.raises(RuntimeError, match="none of 2 candidates can run") as error:
        Choices(path).choose(KEY, runs, DEVICE)
    message = str(error.value)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    assert str(KEY) in message and device in message and "101376" in message


def test_without_memory_for_any_it_is_an_out_of_memory_error(path):
    with pytest.raises(torch.OutOfMemoryError):
        Choices(path).choose(KEY, {"one": failing(torch.OutOfMemoryError("full"))}, DEVICE)


def test_a_choice_made_for_want_of_memory_is_for_this_process_only(path):
    runs = {"large": failing(torch.OutOfMemoryError("full")), **slow_and_fast().runs}
    assert Choices(path).choose(KEY, runs, DEVICE) == "fast"
    assert not path.exists()


@pytest.mark.parametrize(
    "message",
    [
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "Triton Error [CUDA]: invalid argument",
        "PassManager::run failed",
        "CUDA error: too many resources requested for launch",
    ],
)
def test_a_candidate_that_pytorch_or_triton_refuses_is_left_out(path, message):
    runs = {"refused": failing(RuntimeError(message)), **slow_and_fast().runs}
    assert Choices(path).choose(KEY, runs, DEVICE) == "fast"


def test_any_other_error_is_raised(path):
    with pytest.raises(ZeroDivisionError):
        Choices(path).choose(KEY, {"wrong": failing(ZeroDivisionError()), **slow_and_fast().runs}, DEVICE)


class Broken:
    """Stands in for a device that a launch broke: the next synchronisation fails, and with `lasting` each later one."""

    def __init__(self, monkeypatch, lasting: bool):
        self.error = None
        self.lasting = lasting
        monkeypatch.setattr(timing, "synchronize", self.synchronize)

    def launch(self) -> None:
        self.error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize(self, device: torch.device) -> None:
        if (error := self.error) is not None:
            self.error = error if self.lasting else None
            raise error


def test_an_error_of_the_device_is_charged_to_the_candidate_that_caused_it(path, monkeypatch):
    device, waiting = Broken(monkeypatch, lasting=False), slow_and_fast()
    assert Choices(path).choose(KEY, {"fast": waiting.runs["fast"], "wrong": device.launch}, DEVICE) == "fast"
    assert Choices(None).choose(KEY, {"wrong": device.launch, "fast": waiting.runs["fast"]}, DEVICE) == "fast"


def test_an_error_that_the_device_does_not_recover_from_is_raised_at_once(path, monkeypatch):
    device, waiting = Broken(monkeypatch, lasting=True), slow_and_fast()
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access"):
        Choices(path).choose(KEY, {"wrong": device.launch, **waiting.runs}, DEVICE)
    assert not any(waiting.count.values()) and not path.exists()


def test_so_is_one_that_its_launch_reports(path, monkeypatch):
    device, waiting = Broken(monkeypatch, lasting=True), slow_and_fast()

    def launch():
        device.launch()
        raise RuntimeError("Triton Error [CUDA]: misaligned address")

    with pytest.raises(RuntimeError, match=r"^Triton Error \[CUDA\]: misaligned address$"):
        Choices(path).choose(KEY, {"wrong": launch, **waiting.runs}, DEVICE)
    assert not any(waiting.count.values())


# ---- while a CUDA graph is captured ------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch):
    """As within `torch.cuda.graph`."""
    monkeypatch.setattr(timing, "capturing", lambda device: True)


def test_an_open_choice_in_a_capture_is_an_error_that_names_the_key_and_what_to_do(path, captured):
    memory, waiting = Choices(path), slow_and_fast()
    with pytest.raises(RuntimeError, match="run one step of this shape first") as error:
        memory.choose(KEY, waiting.runs, DEVICE)
    assert str(error.value).startswith(f"{KEY}: ")
    assert not any(waiting.count.values()) and memory.remembered(KEY, DEVICE) is None


def test_what_was_chosen_before_holds_in_a_capture(path, monkeypatch):
    memory = Choices(path)
    memory.choose(KEY, slow_and_fast().runs, DEVICE)
    monkeypatch.setattr(timing, "capturing", lambda device: True)
    waiting = slow_and_fast()
    assert memory.choose(KEY, waiting.runs, DEVICE) == "fast"
    assert Choices(path).choose(KEY, waiting.runs, DEVICE) == "fast", "from the file"
    assert not any(waiting.count.values())


def test_where_nothing_would_be_timed_the_first_is_taken_in_a_capture_and_not_remembered(path, captured):
    for memory, candidates in ((Choices(path, timed=False), slow_and_fast()), (Choices(path), Waiting(slow=4.0))):
        assert memory.choose(KEY, candidates.runs, DEVICE) == "slow"
        assert not any(candidates.count.values()) and memory.remembered(KEY, DEVICE) is None


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_a_capture_on_a_gpu_is_noticed(path):
    x = torch.zeros(8, device=DEVICE)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        assert timing.capturing(DEVICE)
        with pytest.raises(RuntimeError, match="run one step of this shape first"):
            Choices(path).choose(KEY, slow_and_fast().runs, DEVICE)
    assert not timing.capturing(DEVICE)


# ---- switched off ------------------------------------------------------------------------------------------------


def test_switched_off_the_first_that_runs_is_taken_and_no_file_is_read_or_written(path):
    Choices(path).choose(KEY, slow_and_fast().runs, DEVICE)
    before = path.read_bytes()
    waiting = slow_and_fast()
    runs = {"large": failing(out_of_resources()), **waiting.runs}
    assert Choices(path, timed=False).choose(KEY, runs, DEVICE) == "slow"
    assert waiting.count == {"slow": 1, "fast": 0}
    assert path.read_bytes() == before


# ---- the file ----------------------------------------------------------------------------------------------------


def test_the_next_process_times_nothing(path):
    Choices(path).choose(KEY, slow_and_fast().runs, DEVICE)
    waiting = slow_and_fast()
    assert Choices(path).choose(KEY, waiting.runs, DEVICE) == "fast"
    assert not any(waiting.count.values())


def test_a_shipped_choice_counts_after_the_user_s_own(path, tmp_path):
    folder = tmp_path / "shipped"
    Choices(folder / "a.json").choose(KEY, slow_and_fast().runs, DEVICE)
    waiting = Waiting(slow=0.0, fast=4.0)
    assert Choices(path, shipped=folder).choose(KEY, waiting.runs, DEVICE) == "fast"
    assert not any(waiting.count.values()) and not path.exists()
    Choices(path).choose(KEY, waiting.runs, DEVICE)
    assert Choices(path, shipped=folder).choose(KEY, waiting.runs, DEVICE) == "slow"


def test_a_shipped_choice_of_another_device_or_version_does_not_count(path, tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"another device": {repr(KEY): {"name": "slow", "milliseconds": {"slow": 1.0}}}})
    )
    assert Choices(path, shipped=tmp_path).choose(KEY, slow_and_fast().runs, DEVICE) == "fast"


def test_another_version_or_device_times_again_and_keeps_what_the_first_stored(path):
    Choices(path).choose(KEY, slow_and_fast().runs, DEVICE)
    [(environment, section)] = json.loads(path.read_text()).items()
    assert torch.__version__ in environment
    path.write_text(json.dumps({"another": section}))
    assert Choices(path).choose(KEY, Waiting(slow=0.0, fast=4.0).runs, DEVICE) == "slow"
    stored = json.loads(path.read_text())
    assert stored["another"] == section and stored[environment][repr(KEY)]["name"] == "slow"


@pytest.mark.parametrize(
    ("file", "holds_kernels"),
    [
        ("conv_forward.py", True),
        ("device/pointwise.py", True),
        ("tuning/model.py", False),
        ("tuning/memory.py", False),
        ("host/arguments.py", False),
    ],
)
def test_a_change_of_a_file_times_again_only_where_it_holds_kernels(tmp_path, file, holds_kernels):
    copy = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = hash_kernels(copy)
    with open(copy / file, "a") as changed:
        changed.write("# a comment\n")
    assert (hash_kernels(copy) != before) == holds_kernels


def test_a_remembered_name_that_is_no_candidate_any_more_is_timed_again(path):
    Choices(path).choose(KEY, Waiting(gone=0.0, slow=4.0).runs, DEVICE)
    assert Choices(path).choose(KEY, slow_and_fast().runs, DEVICE) == "fast"
    assert Choices(path).choose(KEY, {"fast": print}, DEVICE) == "fast"


def test_of_two_that_time_the_same_key_the_first_to_finish_decides(path):
    late = Choices(path)
    late.choose("something else", slow_and_fast().runs, DEVICE)  # has read the file
    Choices(path).choose(KEY, slow_and_fast().runs, DEVICE)
    assert late.choose(KEY, Waiting(slow=0.0, fast=4.0).runs, DEVICE) == "fast"


CONTENTS = {
    "not JSON": "{",
    "empty": "",
    "a list": "[]",
    "of another form": '{"cpu": {"key": "fast"}}',
    "not text": b"\xff\xfe\x00",
    "nested deeply": "[" * 200_000,
    "large": bytes(process_memory._MOST_BYTES + 1),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_corrupted_file_is_set_aside_with_a_warning_and_rebuilt(path, content):
    content = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="could not be read") as caught:
        assert Choices(path).choose(KEY, slow_and_fast().runs, DEVICE) == "fast"
    aside = path.with_suffix(".corrupt")
    assert len(caught) == 1 and str(path) in str(caught[0].message) and str(aside) in str(caught[0].message)
    assert aside.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Choices(path).choose(KEY, {"slow": print, "fast": print}, DEVICE) == "fast"


def test_where_the_folder_cannot_be_made_it_warns_once_and_goes_on_in_memory(tmp_path):
    (tmp_path / "file").touch()
    memory = Choices(tmp_path / "file" / "choices.json")
    with pytest.warns(RuntimeWarning, match="FUSED_RESIDUAL_CACHE") as caught:
        assert memory.choose(KEY, slow_and_fast().runs, DEVICE) == "fast"
        assert memory.choose((*KEY, 2), slow_and_fast().runs, DEVICE) == "fast"
    assert len(caught) == 1
    assert memory.remembered(KEY, DEVICE) == "fast"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_where_the_folder_cannot_be_written_likewise(path):
    path.parent.mkdir()
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(RuntimeWarning, match="FUSED_RESIDUAL_CACHE"):
        assert Choices(path).choose(KEY, slow_and_fast().runs, DEVICE) == "fast"


@pytest.mark.parametrize("place", ["choices.json", "a link's target", "choices.corrupt"])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_left_alone_with_one_warning(path, monkeypatch, kind, place):
    path.parent.mkdir()
    monkeypatch.chdir(path.parent)
    there = Path("choices.corrupt" if place == "choices.corrupt" else "it" if "link" in place else path.name)
    PLACES[kind](there)
    if place == "a link's target":
        path.symlink_to(there)
    elif place == "choices.corrupt":
        path.write_text("{")
    before = there.lstat()
    memory = Choices(path)
    with pytest.warns(RuntimeWarning, match=f"cannot be kept .*expected a regular file, got a {kind}") as caught:
        assert memory.choose(KEY, slow_and_fast().runs, DEVICE) == "fast"
        assert memory.choose((*KEY, 2), slow_and_fast().runs, DEVICE) == "fast"
    assert len(caught) == 1
    if place != "choices.corrupt":
        with pytest.raises(OSError, match="expected a regular file"):
            Choices(path).clear()
    assert (there.lstat().st_mode, there.lstat().st_ino) == (before.st_mode, before.st_ino)


def test_nothing_is_left_beside_the_file(path):
    Choices(path).choose(KEY, slow_and_fast().runs, DEVICE)
    assert list(path.parent.iterdir()) == [path]


def test_clear_forgets_in_memory_and_in_the_file(path):
    memory = Choices(path)
    memory.choose(KEY, slow_and_fast().runs, DEVICE)
    memory.clear()
    assert memory.remembered(KEY, DEVICE) is None and not path.exists() and memory.entries() == {}


# ---- processes ---------------------------------------------------------------------------------------------------


def write(path: Path, name: str) -> None:
    memory = Choices(path)
    for i in range(30):
        memory.choose((name, i), {"a": int, "b": int}, torch.device("cpu"))


def test_processes_that_write_at_once_lose_nothing(path):
    names = "one", "two", "three"
    writers = [multiprocessing.get_context("fork").Process(target=write, args=(path, name)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    [section] = json.loads(path.read_text()).values()
    assert section.keys() == {repr((name, i)) for name in names for i in range(30)}


def test_the_command_lists_what_the_file_in_the_environment_s_folder_holds(tmp_path):
    Choices(tmp_path / "choices.json").choose(KEY, slow_and_fast().runs, DEVICE)
    run = subprocess.run(
        [sys.executable, "-m", "resnet.kernels.tuning", "list"],
        env=os.environ | {"FUSED_RESIDUAL_CACHE": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert torch.__version__ in lines[0] and lines[1].strip() == repr(KEY)
    assert lines[2].split()[0] == "*" and lines[2].endswith("us  fast") and lines[3].endswith("us  slow")


def test_the_command_clears_and_says_where(path, monkeypatch, capsys):
    monkeypatch.setattr(process_memory, "process_choices", Choices(path))
    process_memory.process_choices.choose(KEY, slow_and_fast().runs, DEVICE)
    assert [tuning_command.main([command]) for command in ("path", "clear", "list")] == [0, 0, 0]
    assert not path.exists()
    assert capsys.readouterr().out.splitlines() == [str(path), f"nothing is remembered in {path}"]


def test_without_a_file_the_command_says_why(monkeypatch, capsys):
    monkeypatch.setattr(process_memory, "process_choices", Choices(None))
    assert [tuning_command.main([command]) for command in ("path", "list")] == [0, 0]
    off = "FUSED_RESIDUAL_CACHE is off"
    assert capsys.readouterr().out.splitlines() == [f"no file: {off}", f"nothing is remembered: {off}"]


def test_a_command_that_the_file_system_refuses_fails(path, monkeypatch, capsys):
    monkeypatch.setattr(process_memory, "process_choices", Choices(path))
    path.mkdir(parents=True)  # where a file should be
    assert tuning_command.main(["list"]) == tuning_command.main(["clear"]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["forget"], []], ids=["unknown", "missing"])
def test_an_unknown_or_missing_command_is_an_error_of_one_line_that_lists_the_commands(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        tuning_command.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "list | clear | path" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"]], ids=" ".join)
def test_the_command_s_help_is_no_error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        tuning_command.main(arguments)
    assert stopped.value.code == 0 and "usage: python -m resnet.kernels.tuning" in capsys.readouterr().out


# ---- the environment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FUSED_RESIDUAL_CACHE": "/a/folder"}, "/a/folder"),
        ({"FUSED_RESIDUAL_CACHE": "off"}, None),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/fused-residual"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/somebody/.cache/fused-residual"),
        ({}, "/home/somebody/.cache/fused-residual"),
    ],
)
def test_the_environment_says_where_files_are_kept(monkeypatch, variables, expected):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder(variables) == (expected and Path(expected))


def test_a_user_without_a_home_has_no_folder(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does where neither HOME nor passwd knows one
    assert cache_folder({}) is None


def test_the_environment_says_what_is_timed():
    assert process_memory.tuning_mode({}) == process_memory.tuning_mode({"FUSED_RESIDUAL_TUNING": ""}) == "on"
    for mode in ("on", "off", "full"):
        assert process_memory.tuning_mode({"FUSED_RESIDUAL_TUNING": mode}) == mode


def test_a_bad_switch_is_an_error_that_names_the_variable():
    with pytest.raises(ValueError, match=r"^FUSED_RESIDUAL_TUNING: expected 'on', 'off' or 'full', got 'no'$"):
        process_memory.tuning_mode({"FUSED_RESIDUAL_TUNING": "no"})
