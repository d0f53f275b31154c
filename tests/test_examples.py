"""Every example, run as a user runs it, prints what it claims and leaves no file behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# On a GPU cuDNN's convolutions multiply in TF32, of 10 bits.
ROUNDING = 1e-2 if torch.cuda.is_available() else 1e-4


def environment() -> dict[str, str]:
    """A user's, with the repository on the path; one thread and no timed choice of kernels, for nets so small."""
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "FUSED_RESIDUAL_TUNING": "off",
    }


def number(label: str, output: str) -> float:
    found = re.search(rf"^{re.escape(label)}: (\S+)$", output, re.MULTILINE)
    assert found, f"no line {label!r} in:\n{output}"
    return float(found[1])


def claims_of_drop_in(output: str) -> None:
    assert number("tensors loaded", output) > 100
    assert "same state_dict keys: True" in output
    assert number("largest difference of outputs", output) <= ROUNDING * number("largest output", output)


def claims_of_training_loop(output: str) -> None:
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)$", output, re.MULTILINE)]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]


def claims_of_functional(output: str) -> None:
    lines = re.findall(r"^(\S+): relative difference (\S+)$", output, re.MULTILINE)
    assert [name for name, _ in lines[:3]] == ["output", "input", "convs.0.weight"] and len(lines) == 11
    assert all(float(difference) < 1e-10 for _, difference in lines)


def claims_of_block_by_hand(output: str) -> None:
    losses = re.findall(r"^step \d: loss (\S+) fused, (\S+) plain$", output, re.MULTILINE)
    assert len(losses) == 4 and all(float(fused) == pytest.approx(float(plain), rel=1e-6) for fused, plain in losses)
    assert float(losses[-1][0]) < float(losses[0][0])
    assert "same state_dict keys: True" in output
    assert "batches counted: 4" in output
    assert number("largest difference of the trained values", output) < 1e-9


def claims_of_finished_model(output: str) -> None:
    assert "fused: 4\n" in output and "left as they are" not in output
    losses = re.findall(r"^step \d: loss (\S+) fused, (\S+) eager$", output, re.MULTILINE)
    assert len(losses) == 3 and all(float(fused) == pytest.approx(float(eager), rel=1e-6) for fused, eager in losses)
    assert "the classes are the eager ones again: True" in output
    assert number("largest difference of the trained values", output) < 1e-9


def claims_of_plain_export(output: str) -> None:
    assert "resnet imported where the exported net ran: False" in output
    assert number("largest difference from the fused net", output) <= ROUNDING * number("largest output", output)


def claims_of_d2l_current_edition(output: str) -> None:
    shapes = dict(re.findall(r"^(\w+) output shape: (.+)$", output, re.MULTILINE))
    assert list(shapes) == ["0", "b2", "b3", "b4", "b5", "last"]
    assert shapes["b5"] == "(2, 512, 3, 3)" and shapes["last"] == "(2, 10)"
    assert "LazyResNet18 gives the same: True" in output


CLAIMS = {
    "drop_in": claims_of_drop_in,
    "training_loop": claims_of_training_loop,
    "functional": claims_of_functional,
    "block_by_hand": claims_of_block_by_hand,
    "finished_model": claims_of_finished_model,
    "plain_export": claims_of_plain_export,
    "d2l_current_edition": claims_of_d2l_current_edition,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_an_example_prints_what_it_claims_and_leaves_no_file(name, tmp_path):
    command = [sys.executable, "-m", f"examples.{name}"]
    run = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    CLAIMS[name](run.stdout)
    assert not list(tmp_path.iterdir())


def test_every_example_is_tested_and_listed_with_its_command():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == set(CLAIMS)
    assert scripts == set(re.findall(r"python -m examples\.(\w+)", (EXAMPLES / "README.md").read_text()))
