"""What the documents show is so: their Python runs, and the commands that they name exist, options included."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

COMMAND_TAGS = {"sh", "bash", "console"}
TAGS = {"python", "text"} | COMMAND_TAGS


# ---- reading a document ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of code: the fence's tag, the number of its first line, its lines without the fence's indent."""

    tag: str
    first: int
    lines: tuple[str, ...]


def split(text: str) -> tuple[list[Block], str]:
    """The fenced blocks of a document, and the rest of it."""
    blocks, rest = [], []
    lines = list(enumerate(text.splitlines(), 1))
    while lines:
        number, line = lines.pop(0)
        fence = re.match(r"( *)(```+|~~~+) *(\S*)", line)
        if fence is None:
            rest.append(line)
            continue
        indent, mark, tag = fence.groups()
        inside = []
        while lines and not re.match(rf" *{mark}{mark[0]}* *$", lines[0][1]):
            inside.append(lines.pop(0)[1].removeprefix(indent))
        if not lines:
            raise ValueError(f"line {number}: a fence that is not closed")
        lines.pop(0)
        blocks.append(Block(tag, number + 1, tuple(inside)))
    return blocks, "\n".join(rest)


def program(text: str) -> str:
    """The Python blocks of a document as one program, each line where it is in the document."""
    lines = [""] * len(text.splitlines())
    for block in split(text)[0]:
        if block.tag == "python":
            lines[block.first - 1 : block.first - 1 + len(block.lines)] = block.lines
    return "\n".join(lines) + "\n"


def code(text: str) -> list[str]:
    """Where a document may name a command: lines of fenced and of indented blocks, and spans in backticks."""
    blocks, rest = split(text)
    fenced = [line for block in blocks if block.tag in COMMAND_TAGS for line in block.lines]
    indented = [line for line in rest.splitlines() if line.startswith("    ")]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return fenced + indented + spans


@dataclass(frozen=True)
class Command:
    """`make TARGET...` or `python -m MODULE`, with the options that its line names, a comment's too."""

    program: str
    names: tuple[str, ...]
    options: tuple[str, ...]


def command(line: str) -> Command | None:
    """The command on a line of code, None where there is neither of the two."""
    found = re.match(r" *(?:\$ )?(?:\w+=\S* )*(?:\S*/)?(make|python)[\d.]* (.*)", line)
    if found is None:
        return None
    words = shlex.split(re.split(r"[;&|]|(?:^| )#", found[2])[0])
    options = tuple(re.findall(r"(?<!\S)--[a-z][\w-]*", line))
    if found[1] == "make":
        return Command("make", tuple(word for word in words if "=" not in word and word[0] != "-"), ())
    return Command("python", (words[1],), options) if words[:1] == ["-m"] and len(words) > 1 else None


# ---- checking it -----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FUSED_RESIDUAL_TUNING": "off"}


def run_python(name: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a document's Python in `folder`, in a process of its own: a setter it shows is not left on for others."""
    script = folder / f"{name}.py"
    script.write_text(program(text))
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=work, env=environment(), capture_output=True, text=True, timeout=600)


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def help_of(module: str) -> str:
    """What `python -m MODULE --help` prints; AssertionError where that is no usage."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as changes,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
        pytest.raises(SystemExit),
    ):
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        changes.setattr(sys, "argv", [module, "--help"])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert printed.getvalue().startswith("usage: "), f"python -m {module} --help printed:\n{printed.getvalue()}"
    return printed.getvalue()


def what_is_wrong_with(command: Command) -> str | None:
    if command.program == "make":
        unknown = set(command.names) - targets()
        return f"make {' '.join(sorted(unknown))}: no such target in the Makefile" if unknown else None
    (module,) = command.names
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        return f"python -m {module}: no such module"
    # Other people's modules have help elsewhere, and an example takes no options: test_examples.py runs each.
    if not Path(spec.origin or "").is_relative_to(ROOT) or module.startswith("examples."):
        return None
    known = re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", help_of(module))
    unknown = sorted(set(command.options) - {*known, "--help"})
    return f"python -m {module}: --help does not list {' '.join(unknown)}" if unknown else None


@documents
def test_the_python_of_a_document_runs(document, tmp_path):
    run = run_python(document.stem, document.read_text(), tmp_path)
    assert run.returncode == 0, run.stderr


@documents
def test_commands_that_a_document_names_exist(document):
    commands = dict.fromkeys(filter(None, map(command, code(document.read_text()))))
    assert not list(filter(None, map(what_is_wrong_with, commands)))


@documents
def test_what_is_not_run_is_marked_so(document):
    """By its tag alone: no block without one, none whose tag is Python under another name, no Python in an indent."""
    blocks, rest = split(document.read_text())
    assert not [(block.first, block.tag) for block in blocks if block.tag not in TAGS]
    assert not re.findall(r"^ {4,}(?:>>> |import \w|from [\w.]+ import ).*", rest, re.MULTILINE)


def test_there_are_documents_with_python_and_with_commands():
    texts = [document.read_text() for document in DOCUMENTS]
    assert any(program(text).strip() for text in texts)
    assert {c.program for text in texts for c in filter(None, map(command, code(text)))} == {"make", "python"}


# ---- the checks themselves -------------------------------------------------------------------------------------

DOCUMENT = """Words.

```python
first = 1
```

* a point

  ```python
  if first:
      print(first + 1)
  ```

```text
neither run nor looked at: python -m nothing
```

    make test       # or make nothing
    NAME=1 make PYTHON=python3 -j lint bench
    .venv/bin/python -m resnet.train --impl fused      # or eager; --epochs too

A span is `python3 -m
pip list | less`, and `makers` is none.
"""


def test_blocks_share_a_namespace_in_order(tmp_path):
    run = run_python("DOCUMENT", DOCUMENT, tmp_path)
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr


@pytest.mark.parametrize(
    ("broken", "line", "error"),
    [
        (DOCUMENT.replace("first + 1", "second + 1"), 11, "NameError: name 'second' is not defined"),
        (DOCUMENT.replace("first = 1", "open('nothing.pt')"), 4, "FileNotFoundError"),
    ],
    ids=["undefined name", "missing file"],
)
def test_an_error_in_a_block_is_found_on_its_line_of_the_document(tmp_path, broken, line, error):
    run = run_python("DOCUMENT", broken, tmp_path)
    assert run.returncode == 1
    assert f'DOCUMENT.py", line {line}' in run.stderr and error in run.stderr


def test_commands_are_found_in_blocks_indents_and_spans():
    assert list(filter(None, map(command, code(DOCUMENT)))) == [
        Command("make", ("test",), ()),
        Command("make", ("lint", "bench"), ()),
        Command("python", ("resnet.train",), ("--impl", "--epochs")),
        Command("python", ("pip",), ()),
    ]
    console = "```console\n$ python -m a.b --c\nmake: an error\n```"
    assert list(filter(None, map(command, code(console)))) == [Command("python", ("a.b",), ("--c",))]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("make test nothing", "make nothing: no such target"),
        ("python -m resnet.nothing", "python -m resnet.nothing: no such module"),
        ("python -m nothing.at.all", "python -m nothing.at.all: no such module"),
        ("python -m resnet.train --impl fused --nothing", "does not list --nothing"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line, complaint):
    assert complaint in what_is_wrong_with(command(line))


def test_a_fence_that_is_not_closed_is_an_error():
    with pytest.raises(ValueError, match="line 2: a fence that is not closed"):
        split("a\n```python\nb\n")
