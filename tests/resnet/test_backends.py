"""What `resnet.backend` and `resnet.convolution` choose, their start values, and where Triton cannot launch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from resnet import FusedResidual, backend, backends, convolution
from resnet.kernels.tuning import memory
from resnet.triton_backend import batch_norm as triton_batch_norm
from resnet.triton_backend.convolution import pick
from tests.conftest import DEVICE, ROOT
from tests.helpers.blocks import draw


@pytest.fixture
def launches(monkeypatch):
    """An entry for each merge of partial statistics, whether their own kernel or a convolution's epilogue made them."""
    count = []
    finalize = triton_batch_norm.batch_norm_finalize
    monkeypatch.setattr(triton_batch_norm, "batch_norm_finalize", lambda *args: (count.append(1), finalize(*args))[1])
    return count


# ---- what it chooses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "launched"),
    [("triton", 2), ("torch", 0), ("auto", 2 if DEVICE.type == "cuda" else 0)],
    ids=["triton", "torch", "auto"],
)
def test_a_block_launches_triton_only_where_it_was_chosen(launches, name, launched):
    block = FusedResidual(3, 3).to(DEVICE)
    with backend(name):
        block(draw(2, 3, 4, 4))
    assert len(launches) == launched


def test_backend_auto_takes_pytorch_for_tensors_on_the_cpu(launches):
    with backend("auto"):
        FusedResidual(3, 3)(torch.rand(2, 3, 4, 4))
    assert not launches


def test_backend_auto_needs_no_triton_for_a_dry_run_on_meta(monkeypatch):
    monkeypatch.setattr(backends, "_triton", None)
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    with backend("auto"), torch.device("meta"):
        out = FusedResidual(3, 6, True, 2)(torch.rand(2, 3, 4, 4))
        out.sum().backward()
    assert out.shape == (2, 6, 2, 2)


# ---- the convolutions ------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
VARIANTS = {name: (lambda n=name: n) for name in ("triton", "epilogue", "pytorch")}


def picked(*names: str, key: tuple = (), device: torch.device = CPU) -> str:
    return pick("forward", key, {name: VARIANTS[name] for name in names}, device)()


@pytest.mark.parametrize("name", ["triton", "epilogue", "pytorch"])
def test_the_convolution_that_was_chosen_is_picked(name):
    with convolution(name):
        assert picked("triton", "epilogue", "pytorch") == name


def test_where_the_chosen_convolution_does_not_exist_the_next_one_is_picked():
    with convolution("triton"):
        assert picked("epilogue", "pytorch") == "epilogue"
        assert picked("pytorch") == "pytorch"
    with convolution("epilogue"):
        assert picked("triton", "pytorch") == "pytorch"


def test_convolution_auto_on_the_cpu_is_triton_and_runs_nothing():
    def run():
        raise AssertionError("called")

    with convolution("auto"):
        assert pick("forward", (), {"triton": run, "pytorch": run}, CPU) is run


@pytest.mark.skipif(DEVICE.type != "cuda", reason="times on a GPU")
def test_convolution_auto_on_a_gpu_picks_the_fastest_per_direction(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "choose", memory.Choices(tmp_path / "choices.json").choose)
    wait = lambda clocks: lambda: torch.cuda._sleep(clocks)  # noqa: E731
    with convolution("auto"):
        for direction, fastest in (("forward", "epilogue"), ("grad_input", "pytorch")):
            variants = {name: wait(10_000 if name == fastest else 1_000_000) for name in VARIANTS}
            assert pick(direction, ("key",), variants, DEVICE) is variants[fastest]


# ---- where Python starts ---------------------------------------------------------------------------------------


def python(program: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a program in an environment with these variables, and without the interpreter unless they choose it."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_RESIDUAL_BACKEND")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", program], env=env | variables, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", ["auto", "torch", "triton"])
def test_the_environment_sets_the_backends_start_value(name):
    run = python("import resnet; print(resnet.current_backend())", FUSED_RESIDUAL_BACKEND=name, TRITON_INTERPRET="1")
    assert run.stdout == f"{name}\n", run.stderr


def test_without_the_variable_the_backend_starts_as_auto():
    run = python("import resnet; print(resnet.current_backend())")
    assert run.stdout == "auto\n", run.stderr


def test_an_empty_variable_counts_as_unset():
    run = python(
        "import resnet; print(resnet.current_backend(), resnet.current_convolution())",
        FUSED_RESIDUAL_BACKEND="",
        FUSED_RESIDUAL_CONV="",
    )
    assert run.stdout == "auto auto\n", run.stderr


def test_the_environment_sets_the_convolutions_start_value():
    run = python("import resnet; print(resnet.current_convolution())", FUSED_RESIDUAL_CONV="epilogue")
    assert run.stdout == "epilogue\n", run.stderr


def test_a_bad_start_value_is_an_error_that_names_the_variable():
    run = python("import resnet", FUSED_RESIDUAL_BACKEND="cudnn")
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last == "ValueError: FUSED_RESIDUAL_BACKEND: expected one of 'auto', 'triton', 'torch', got 'cudnn'"


WITHOUT_GPU = """
import torch, resnet

def fails(call):
    try:
        call()
    except RuntimeError as error:
        assert "needs a GPU" in str(error) and "TRITON_INTERPRET=1" in str(error), error
    else:
        raise AssertionError("no error")

{}
print("as it should")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, where Triton can launch")
def test_triton_without_gpu_and_interpreter_says_what_to_set_and_leaves_the_choice():
    program = """
resnet.backend("torch")
fails(lambda: resnet.backend("triton"))
assert resnet.current_backend() == "torch"
resnet.FusedResidual(3, 3)(torch.rand(2, 3, 4, 4)).sum().backward()
"""
    run = python(WITHOUT_GPU.format(program))
    assert run.stdout == "as it should\n", run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, where Triton can launch")
def test_triton_as_the_start_value_without_gpu_and_interpreter_says_it_at_the_first_call():
    program = """
block = resnet.FusedResidual(3, 3)
before = {k: v.clone() for k, v in block.state_dict().items()}
fails(lambda: block(torch.rand(2, 3, 4, 4)))
assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items()), "changed before the error"
"""
    run = python(WITHOUT_GPU.format(program), FUSED_RESIDUAL_BACKEND="triton")
    assert run.stdout == "as it should\n", run.stderr
