"""Where there is no GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported.

`tests/emulated` and `tests/gate` are the exceptions: they compile the kernels, in processes of their own.
"""

import gc
import os
import sys
from pathlib import Path

import torch

# A worker of pytest-xdist has the environment of the process that started it, but not its arguments.
if (
    not torch.cuda.is_available()
    and "PYTEST_XDIST_WORKER" not in os.environ
    and not any(folder in argument for argument in sys.argv for folder in ("tests/emulated", "tests/gate"))
):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests.helpers.interpreter import interpreted  # noqa: F401
from tests.helpers.sanitizer import sanitizer  # noqa: F401


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# PyTorch's convolutions on a GPU, with which tests compare, are exact and repeatable. A test of TF32 says so.
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=["torch", "triton"])
def any_backend(request):
    """Run the test on PyTorch's operators and on the Triton kernels (compiled on a GPU, interpreted elsewhere).

    The convolutions are PyTorch's in both, since the interpreter takes seconds for a Triton one.
    tests/resnet/triton_backend/test_convolution.py runs those.
    """
    import resnet

    with resnet.backend(request.param), resnet.convolution("pytorch"):
        yield request.param


@pytest.fixture
def own_convolutions():
    """The Triton backend as users have it: "auto" is "triton" where nothing can be timed."""
    import resnet

    with resnet.backend("triton"), resnet.convolution("triton"):
        yield


@pytest.fixture(scope="session", autouse=True)
def offline():
    """No test, and no command that a test starts, downloads the data set; what they serve themselves needs no proxy."""
    with pytest.MonkeyPatch.context() as changes:
        changes.setenv("FASHION_MNIST_URL", "http://127.0.0.1:9/")  # the discard port: nobody listens
        changes.setenv("no_proxy", "*")
        yield


@pytest.fixture(scope="session", autouse=True)
def colourless():
    """What a command that a test starts prints is text alone, where colours are forced, too."""
    with pytest.MonkeyPatch.context() as changes:
        for name in ("FORCE_COLOR", "PY_COLORS", "PYTHON_COLORS"):
            changes.delenv(name, raising=False)
        changes.setenv("NO_COLOR", "1")
        yield


@pytest.fixture(scope="session")
def inductor():
    """Skips the test where torch.compile cannot build code, for want of a C++ compiler or of Python's headers."""
    from benchmarks.common import compile_unavailable

    if reason := compile_unavailable(DEVICE.type):
        pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def safe_eager():
    """Eager's strided 1x1 convolutions of few channels pick their pixels first and convolve these with stride 1.

    oneDNN's strided one writes past the end of a buffer in backward (see `torch_backend.convolution.overruns`), which
    would end this process some tests later.
    """
    from resnet.torch_backend.convolution import overruns

    plain = torch.nn.functional.conv2d

    def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        step = stride if isinstance(stride, int) else max(stride)
        if overruns(x, weight.shape, step) and padding in (0, (0, 0)):
            x, stride = x[:, :, ::step, ::step], 1
        return plain(x, weight, bias, stride, padding, dilation, groups)

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(torch.nn.functional, "conv2d", conv2d)
        yield


@pytest.fixture(scope="module", autouse=True)
def collected_once():
    """The garbage collector leaves alone what is there when a file's tests begin.

    PyTorch's compiler and its checks of operators keep millions of objects, and a collection looks through all of them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """The tests' tensors are so small that a second thread gains nothing, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
