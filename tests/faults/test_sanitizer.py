"""The sanitizer catches what it is there for: each kernel here breaks one rule, and its sound twin passes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.helpers import sanitizer
from tests.helpers.sanitizer import MemoryFault, watching

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled, not interpreted"),
]

N, BLOCK = 20, 8


@triton.jit
def copy_kernel(x, out, N, SHIFT: tl.constexpr, STORE_SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x[i + SHIFT], stored STORE_SHIFT further on."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i + STORE_SHIFT, tl.load(x + i + SHIFT, mask=i < N), mask=i < N)


@triton.jit
def unmasked_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def overlapping_kernel(out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(out + i, i)


@triton.jit
def colliding_lanes_kernel(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i)


@triton.jit
def running_sum_kernel(x, out):
    i = tl.program_id(0)
    before = tl.load(out + i - 1, mask=i > 0, other=0)
    tl.store(out + i, before + tl.load(x + i))


@triton.jit
def shift_in_place_kernel(x, N):
    """x[i] = x[i + 1], which the next program may have replaced by then."""
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i + 1, mask=i + 1 < N, other=0))


@triton.jit
def add_kernel(x, total, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(total + i, tl.load(x + tl.program_id(0) * BLOCK + i))


@triton.jit
def last_writer_kernel(out):
    tl.store(out, tl.program_id(0))


def copy(x: Tensor, out: Tensor, n: int = N, shift: int = 0, store_shift: int = 0) -> None:
    copy_kernel[(triton.cdiv(N, BLOCK),)](x, out, n, SHIFT=shift, STORE_SHIFT=store_shift, BLOCK=BLOCK)


def test_a_sound_launch_passes_and_does_its_work():
    x, out = torch.randn(N), torch.zeros(N)
    copy(x, out)
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    "shift, where",
    [(1, "1 elements past the last"), (-3, "3 elements before the first"), (10**9, "past the last")],
    ids=["just past", "before", "far past"],
)
def test_a_stray_read_is_caught(shift, where):
    """So is one far astray, which on real memory may land in another tensor."""
    x, out = torch.randn(N), torch.zeros(N)
    with pytest.raises(MemoryFault, match=f"copy_kernel, program .* reads .* outside its tensor.*{where} of x"):
        copy(x, out, shift=shift)


@pytest.mark.parametrize(
    "shift, where",
    [(1, "1 elements past the last"), (-3, "3 elements before the first")],
    ids=["just past", "before"],
)
def test_a_stray_write_is_caught_before_it_is_made(shift, where):
    storage = torch.full((3 * N,), 7.0)
    with pytest.raises(MemoryFault, match=f"writes .* outside its tensor.*{where} of out"):
        copy(torch.randn(N), storage[N : 2 * N], store_shift=shift)
    assert (storage[:N] == 7).all() and (storage[2 * N :] == 7).all()


def test_a_dropped_mask_is_caught():
    with pytest.raises(MemoryFault, match="reads 4 elements outside its tensor, the first 1 elements past the last"):
        unmasked_kernel[(triton.cdiv(N, BLOCK),)](torch.randn(N), torch.zeros(N), BLOCK=BLOCK)


def test_a_tensor_ends_where_its_view_does():
    """The rest of the storage is another's, and so are the elements between the strides."""
    storage = torch.randn(2 * N)
    with pytest.raises(MemoryFault, match="outside its tensor"):
        copy(storage[:N], torch.zeros(N), shift=1)
    with pytest.raises(MemoryFault, match=r"element .* of x .* between its strides"):
        copy(storage[::2], torch.zeros(N))


def test_a_pointer_does_not_reach_another_argument():
    storage = torch.randn(2 * N)
    with pytest.raises(MemoryFault, match="past the last of x"):
        copy(storage[:N], storage[N:], shift=N)


def test_an_unwritten_element_is_caught():
    with pytest.raises(MemoryFault, match=f"copy_kernel.* 1 elements stay unwritten, the first element {N - 1} of out"):
        copy(torch.randn(N), torch.zeros(N), n=N - 1)


def test_a_tile_that_no_program_takes_is_caught():
    with pytest.raises(MemoryFault, match=f"{N - BLOCK} elements stay unwritten"):
        copy_kernel[(1,)](torch.randn(N), torch.zeros(N), N, SHIFT=0, STORE_SHIFT=0, BLOCK=BLOCK)


def test_an_element_written_by_two_programs_is_caught():
    with pytest.raises(MemoryFault, match=r"writes again what program .* wrote"):
        overlapping_kernel[(3,)](torch.zeros(2 * BLOCK, dtype=torch.int32), BLOCK=BLOCK)


def test_an_element_written_by_two_lanes_is_caught():
    with pytest.raises(MemoryFault, match="several lanes of one store write the same element of out"):
        colliding_lanes_kernel[(1,)](torch.zeros(BLOCK // 2, dtype=torch.int32), BLOCK=BLOCK)


def test_a_kernel_for_which_it_is_declared_may_write_twice(monkeypatch):
    out = torch.zeros(2 * BLOCK, dtype=torch.int32)
    monkeypatch.setitem(sanitizer.WRITES_OTHERWISE, ("overlapping_kernel", "out"), "halves overlap, with equal values")
    overlapping_kernel[(3,)](out, BLOCK=BLOCK)
    assert out.tolist() == list(range(2 * BLOCK))


def test_a_program_that_reads_what_another_writes_is_caught():
    with pytest.raises(MemoryFault, match=r"reads what program .* wrote, element .* of out"):
        running_sum_kernel[(8,)](torch.ones(8), torch.zeros(8))


def test_a_program_that_overwrites_what_another_reads_is_caught():
    with pytest.raises(MemoryFault, match=r"reads what program .* wrote"):
        shift_in_place_kernel[(16,)](torch.arange(16.0), 16)


def test_a_sum_that_depends_on_the_order_of_the_programs_is_caught():
    """Atomics may write an element many times; their sum has to be the same in every order."""
    x = torch.randn(16, 64)
    add_kernel[(16,)](x.round(), torch.zeros(64), BLOCK=64)  # exact in any order
    with pytest.raises(MemoryFault, match="total depends on the order of the programs"):
        add_kernel[(16,)](x, torch.zeros(64), BLOCK=64)


def test_a_result_of_the_last_program_to_write_is_caught_though_writing_twice_is_declared(monkeypatch):
    monkeypatch.setitem(sanitizer.WRITES_OTHERWISE, ("last_writer_kernel", "out"), "for this test")
    with pytest.raises(MemoryFault, match="out depends on the order of the programs"):
        last_writer_kernel[(64,)](torch.zeros(1, dtype=torch.int32))


def test_a_result_may_take_the_place_of_an_input():
    x = torch.randn(N)
    expected = x.clone()
    copy(x, x)
    assert torch.equal(x, expected)


def test_programs_can_be_chosen_and_their_accesses_kept():
    x, out = torch.randn(N), torch.zeros(N)
    with watching(lambda grid: [(grid[0] - 1, 0, 0)]) as launches:
        copy(x, out)
    (launch,) = launches
    assert launch.accessed("x", sanitizer.READS).tolist() == [16, 17, 18, 19]
    assert launch.accessed("out", sanitizer.WRITES).tolist() == [16, 17, 18, 19]
    assert torch.equal(out[16:], x[16:]) and not out[:16].any()
