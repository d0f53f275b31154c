"""Every kernel, as real calls specialise it, compiled for four devices: see `benchmarks.compiled.limits`."""

import pytest

from benchmarks.compiled.report import JUDGED

PROMISES = {
    "error": "it compiles",
    "spill": "no register is spilled",
    "width": "bulk accesses are 16 bytes wide where alignment allows it",
    "tensor": "products of 16-bit values and in TF32 use tensor cores",
    "shared": "shared memory fits the device",
    "occupancy": "enough warps are resident",
}


@pytest.mark.parametrize("kind", PROMISES, ids=PROMISES.values())
@pytest.mark.parametrize("device", JUDGED)
def test_every_compiled_kernel_keeps_to_the_limit(reported, device, kind):
    rows = [row for row in reported[0] if row.device == device]
    broken = [f"{row.name}: {text}" for row in rows for found, text in row.problems if found == kind]
    assert rows and not broken, "\n".join(broken)


def test_every_kernel_of_the_package_is_reached(reported):
    assert reported[1] == []
