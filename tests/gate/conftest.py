"""The gate compiles the kernels, so it runs in a process of its own: `make gate`."""

import pytest
from triton import knobs

from benchmarks.compiled import report


@pytest.fixture(scope="session", autouse=True)
def compiled():
    if knobs.runtime.interpret:
        pytest.skip("the kernels are interpreted in this process (TRITON_INTERPRET); run make gate")


@pytest.fixture(scope="session")
def reported(compiled):
    """(rows, functions that no call reached) of the share of specialisations that every change is judged by."""
    return report.report()
