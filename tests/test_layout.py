"""The rules of the rooms, read from the sources, and what a wheel and a source distribution of them hold."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# ---- the rooms ------------------------------------------------------------------------------------------------------

KERNELS, RESNET = ROOT / "kernels", ROOT / "resnet"


def sources(folder: Path) -> list[Path]:
    """A folder's modules, without those that resnet/kernels links to."""
    return [path for path in sorted(folder.rglob("*.py")) if RESNET / "kernels" not in path.parents]


def imports(path: Path) -> Iterator[str]:
    """The name of each module or object that is imported; a relative import keeps its dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" if node.module else module + alias.name for alias in node.names)


def mentions(path: Path, name: str) -> bool:
    """Whether a module imports a dotted name or something in it, or writes it in code; comments do not count."""
    written = (ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    return any(f".{name}." in f".{other}." for other in (*imports(path), *written))


def offenders(folder: Path, is_wrong) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sources(folder) if is_wrong(path)]


def test_the_rooms_are_where_these_tests_look_for_them():
    assert (RESNET / "kernels").resolve() == KERNELS
    assert {KERNELS / "conv_forward.py", KERNELS / "device" / "pointwise.py"} <= set(sources(KERNELS))
    assert {RESNET / "ops.py", RESNET / "torch_backend" / "block.py"} <= set(sources(RESNET))


def test_kernels_import_each_other_relatively_and_nothing_else_of_the_repository():
    def leaves_kernels(path: Path) -> bool:
        depth = len(path.relative_to(KERNELS).parts)
        absolute = {name.split(".")[0] for name in imports(path)} - {""}
        dots = max((len(name) - len(name.lstrip(".")) for name in imports(path)), default=0)
        return dots > depth or bool(absolute & {"kernels", "resnet", "benchmarks", "examples", "tests"})

    assert not offenders(KERNELS, leaves_kernels)


def test_resnet_imports_kernels_as_its_own_and_neither_benchmarks_nor_examples_nor_tests():
    def looks_outside(path: Path) -> bool:
        return bool({name.split(".")[0] for name in imports(path)} & {"kernels", "benchmarks", "examples", "tests"})

    assert not offenders(RESNET, looks_outside)


@pytest.mark.parametrize("name", ["autograd", "nn.Module"])
def test_kernels_know_neither_autograd_nor_modules(name):
    assert not offenders(KERNELS, lambda path: mentions(path, name))


def test_kernels_do_not_ask_whether_a_tensor_is_on_a_gpu():
    assert not offenders(KERNELS, lambda path: "is_cuda" in path.read_text())


def test_each_file_at_the_top_of_kernels_holds_a_kernel():
    def has_no_kernel(path: Path) -> bool:
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        decorators = [ast.unparse(decorator) for function in functions for decorator in function.decorator_list]
        return not any(decorator.split("(")[0] == "triton.jit" for decorator in decorators)

    at_the_top = [path for path in KERNELS.glob("*.py") if path.name != "__init__.py"]
    assert not [path.name for path in at_the_top if has_no_kernel(path)]


def test_operators_are_registered_in_registration_alone():
    assert offenders(RESNET, lambda path: mentions(path, "torch.library")) == ["resnet/registration.py"]
    assert not offenders(KERNELS, lambda path: mentions(path, "torch.library"))


# ---- distributions --------------------------------------------------------------------------------------------------


def run(*command: str | Path, cwd: Path, path: Path) -> str:
    """Run Python in a folder, with one folder before the environment's own packages; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in_git(*folders: str) -> list[str]:
    """The files that git tracks in these folders, or has not been told to ignore; links are not followed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in listed if name and os.path.lexists(ROOT / name)})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, in which a build may leave its files."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the distributions, is not installed")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so nothing says which files are the project's")
    asked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode != 0:  # a checkout of another user's, say, as a mounted folder may be
        pytest.skip(f"git does not list the project's files: {asked.stderr.strip()}")
    copy = tmp_path_factory.mktemp("checkout")
    for name in files_in_git("."):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> Path:
    """A folder whose torch cannot be imported: a build must not need it."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text("raise ImportError('the build imports torch')")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, without_torch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--wheel-dir")
    run("-m", "pip", "wheel", *options, folder, checkout, cwd=folder, path=without_torch)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_the_package_with_its_kernels_its_data_and_its_types_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"resnet"}
    package = {path.relative_to(ROOT).as_posix() for path in sources(RESNET)}
    kernels = {f"resnet/{path.relative_to(ROOT).as_posix()}" for path in sources(KERNELS)}
    data = {path.relative_to(ROOT).as_posix() for path in (RESNET / "data" / "fashion_mnist_sample").iterdir()}
    assert {name for name in names if name.startswith("resnet/")} == package | kernels | data | {"resnet/py.typed"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder of packages with the installed wheel, in which a package `kernels` of somebody else was before."""
    packages = tmp_path_factory.mktemp("packages")
    (packages / "kernels").mkdir()
    (packages / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    # Without --upgrade pip leaves a folder as it is that a package of the wheel would replace.
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target")
    run("-m", "pip", "install", *options, packages, wheel, cwd=packages, path=packages)
    return packages


def test_an_installed_wheel_lives_beside_another_package_that_is_called_kernels(installed, tmp_path):
    program = "import kernels, resnet.kernels.conv_forward as k; print(kernels.whose, kernels.__path__, k.__file__)"
    whose, path, ours = run("-c", program, cwd=tmp_path, path=installed).split()
    assert (whose, path) == ("theirs", str([str(installed / "kernels")]))
    assert ours == str(installed / "resnet" / "kernels" / "conv_forward.py")
    assert {file.name for file in (installed / "kernels").iterdir()} <= {"__init__.py", "__pycache__"}


def test_the_version_of_an_installed_wheel_is_that_of_the_package(installed, tmp_path):
    program = (
        "import importlib.metadata, resnet; print(importlib.metadata.version('fused-residual'), resnet.__version__)"
    )
    of_the_wheel, of_the_package = run("-c", program, cwd=tmp_path, path=installed).split()
    assert of_the_wheel == of_the_package


def test_a_source_distribution_holds_all_that_tests_need_and_builds_the_same_wheel(
    checkout, without_torch, wheel, tmp_path
):
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run("-c", build, tmp_path, cwd=checkout, path=without_torch)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    needed = files_in_git("tests", "results")  # the tests read the results, and the documents link to them
    assert not [name for name in needed if not (unpacked / name).is_file()]
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    run("-c", build, tmp_path, cwd=unpacked, path=without_torch)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
