"""What the report reads off compiled code, judges and shows; tests/gate compiles the kernels themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from benchmarks.compiled import limits, report
from benchmarks.compiled.binaries import Figures, amdgcn_figures, llvm_accesses, ptx_accesses, sass_figures
from benchmarks.compiled.launches import RecordedLaunch, TensorArgument, unite
from benchmarks.compiled.limits import bulk_tensors, problems
from resnet.kernels.tuning import DEVICES

# ---- reading -----------------------------------------------------------------------------------------------------

PTX = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1, .param .u64 kernel_param_2)
.reqntid 128
{
  ld.param.b64 %rd1, [kernel_param_0];
  ld.param.b32 %r1, [kernel_param_1];
  ld.param.b64 %rd2, [kernel_param_2];
  mad.wide.s32 %rd3, %r1, 2, %rd1; // x + offset
  @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd3 + 0 ];
  cp.async.cg.shared.global [ %r9 + 0 ], [ %rd3 + 64 ], 0x8, %r7;
  add.s64 %rd4, %rd2, 16;
  st.global.v2.b16 [ %rd4 + 0 ], { %rs1, %rs2 };
  ld.shared.b32 %r6, [%r9];
  ret;
}
"""


def test_an_access_in_ptx_belongs_to_the_argument_that_its_address_was_made_of():
    assert ptx_accesses(PTX, ["x", "", "y"]) == ({"x": [8, 16]}, {"y": [4]})


LLVM = """
define amdgpu_kernel void @kernel(ptr addrspace(1) inreg %0, ptr addrspace(1) inreg %1, i32 inreg %2) #0 {
  %4 = getelementptr half, ptr addrspace(1) %0, i32 %2
  %5 = load <8 x half>, ptr addrspace(1) %4, align 16
  %6 = getelementptr i8, ptr addrspace(1) %1, i32 %2
  store <2 x i8> %7, ptr addrspace(1) %6, align 2
  ret void
}
"""


def test_an_access_in_llvm_ir_belongs_to_the_argument_that_its_address_was_made_of():
    assert llvm_accesses(LLVM, ["x", "tap", ""]) == ({"x": [16]}, {"tap": [2]})


def test_figures_of_nvidias_machine_code():
    opcodes = ["LDG.E.128", "STG.E.U16", "LDL", "STL.64", "HMMA.16816.F32", "BAR.SYNC", "FFMA", "IADD3", "EXIT"]
    figures = sass_figures(opcodes)
    assert figures["spills"] == 2 and figures["barriers"] == 1
    assert figures["widths"] == {"load 16": 1, "store 2": 1} and figures["tensor"] == {"HMMA": 1}
    assert figures["mix"] == {
        "tensor": 1,
        "global": 2,
        "local": 2,
        "barrier": 1,
        "float": 1,
        "branch": 1,
        "integer": 1,
    }


def test_figures_of_amds_assembly():
    text = "\tglobal_load_dwordx4 v[0:3]\n\tv_mfma_f32_32x32x8_f16 a\n\ts_barrier\n\tscratch_store_dword v0\n"
    metadata = "    .vgpr_count:     84\n    .vgpr_spill_count: 3\n    .private_segment_fixed_size: 16\n"
    figures = amdgcn_figures(text + metadata)
    assert (figures["registers"], figures["spills"], figures["stack"], figures["barriers"]) == (84, 3, 16, 1)
    assert figures["widths"] == {"load 16": 1} and figures["tensor"] == {"v_mfma_f32_32x32x8_f16": 1}


# ---- judging -----------------------------------------------------------------------------------------------------


def launch(kernel: str = "apply_kernel", itemsize: int = 2, *, warps: int = 4, aligned: bool = True, **blocks: int):
    """Of x, a megabyte of elements of `itemsize` bytes, in tiles of `blocks`."""
    kind = {2: "*fp16", 4: "*fp32", 8: "*fp64"}[itemsize]
    names = ["x", *blocks]
    return RecordedLaunch(
        module="resnet.kernels.batch_norm_add_relu",
        kernel=kernel,
        signature={"x": kind, **dict.fromkeys(blocks, "constexpr")},
        constants={(names.index(name),): value for name, value in blocks.items()},
        attributes={(0,): [["tt.divisibility", 16]]},
        options={"num_warps": warps},
        tensors={"x": TensorArgument(itemsize, 2**20, aligned)},
    )


def kinds(figures: Figures, made: RecordedLaunch, device: str = "sm_80") -> set[str]:
    return {kind for kind, _ in problems(DEVICES[device], made, figures)}


GOOD = Figures(registers=64, shared=1024, warps=4, occupancy=0.5, loads={"x": [16]}, stores={"x": [16]})
TILE = {"BLOCK_M": 32, "BLOCK_C": 64}


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"spills": 1, "stack": 8, "registers": 255}, "spill"),
        ({"spills": 1, "stack": 40}, "spill"),
        ({"spills": 1, "stack": 8, "registers": 104, "occupancy": 0.25}, "spill"),  # as many blocks with 112
        ({"error": "OutOfResources"}, "error"),
        ({"shared": 200 * 1024}, "shared"),
        ({"occupancy": 0.1}, "occupancy"),
        ({"loads": {"x": [4, 16]}}, "width"),
        ({"products": ["f16"]}, "tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_broken_limit_is_named(change, kind):
    assert not kinds(GOOD, launch(**TILE))
    assert kinds(dataclasses.replace(GOOD, **change), launch(**TILE)) == {kind}


def test_a_few_words_may_be_spilled_where_a_register_more_costs_a_block():
    traded = dataclasses.replace(GOOD, spills=8, stack=32)
    assert not kinds(traded, launch(**TILE))
    assert kinds(traded, launch(**TILE), "gfx942") == {"spill"}


def test_an_access_is_asked_to_be_as_wide_as_alignment_and_the_tile_allow():
    device = DEVICES["sm_80"]
    assert bulk_tensors(launch(**TILE), device) == {"x": 16}
    assert bulk_tensors(launch(BLOCK_M=16, BLOCK_C=32), device) == {"x": 8}  # four halves for each of 128 threads
    assert bulk_tensors(launch(BLOCK_M=16, BLOCK_N=64, BLOCK_K=16, warps=2), device) == {"x": 8}
    assert bulk_tensors(launch(**TILE, aligned=False), device) == {}
    assert bulk_tensors(launch(**TILE), DEVICES["gfx942"]) == {"x": 8}


def test_occupancy_is_that_of_the_scarcest_resource():
    device = DEVICES["sm_80"]
    assert device.occupancy(registers=32, warps=4, shared=0) == 1
    assert device.occupancy(registers=64, warps=4, shared=0) == 0.5
    assert device.occupancy(registers=65, warps=4, shared=0) == 7 * 4 / 64  # of 72, in steps of 8
    assert device.occupancy(registers=32, warps=4, shared=81 * 1024) == 2 * 4 / 64
    assert device.occupancy(registers=32, warps=1, shared=0) == 0.5  # 32 blocks at most


def test_every_exception_has_a_reason():
    assert all(why for *_, why in limits.NARROWER)


# ---- which are compiled --------------------------------------------------------------------------------------------


def test_a_share_has_every_feature_and_tile_and_every_element_size_on_each_device():
    mine = [launch(itemsize=size, BLOCK_M=m, BLOCK_C=c) for size in (2, 4, 8) for m in (16, 32, 64) for c in (32, 64)]
    devices = ("sm_80", "sm_90", "gfx942")
    chosen = report.share(dict.fromkeys(devices, mine))
    assert len(chosen) < len(mine) * len(devices) / 2
    assert {f for made, _ in chosen for f in made.features} == {f for made in mine for f in made.features}
    assert {(made.tile, made.itemsize) for made, _ in chosen} == {(made.tile, made.itemsize) for made in mine}
    assert {(made.itemsize, device) for made, device in chosen} == {(size, d) for size in (2, 4, 8) for d in devices}


def test_a_share_has_every_tile_of_a_gemm_on_each_device():
    mine = [launch("conv", BLOCK_M=m, BLOCK_N=64, BLOCK_K=k) for m in (32, 64) for k in (16, 32)]
    chosen = report.share({"sm_80": mine, "sm_90": mine})
    assert {(made.tile, device) for made, device in chosen} == {
        (made.tile, device) for made in mine for device in ("sm_80", "sm_90")
    }


def test_of_launches_that_a_share_could_take_it_takes_the_one_that_holds_most():
    plain, ragged = launch(**TILE), launch(**TILE, aligned=False)
    for mine in ([plain, ragged], [ragged, plain]):
        ((chosen, _),) = report.share({"sm_80": mine})
        assert chosen is ragged


def test_launches_of_one_specialisation_are_united():
    first, second = launch(**TILE), launch(**TILE)
    first.cases, second.cases = ["a"], ["b"]
    second.tensors = {"x": TensorArgument(2, 2**24, False)}
    (one,) = unite([first, second])
    assert one.cases == ["a", "b"] and one.tensors["x"] == TensorArgument(2, 2**24, False)


def test_rows_of_whole_vectors_are_aligned():
    x = torch.empty(2, 8, 4, 4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert TensorArgument.of(x).aligned and not TensorArgument.of(x[:, :6]).aligned
    assert not TensorArgument.of(torch.empty(4, 6, dtype=torch.float16)).aligned


# ---- shown ---------------------------------------------------------------------------------------------------------


def row(device: str = "sm_80", **figures: object) -> report.CompiledLaunch:
    return report.CompiledLaunch(device, launch(**TILE), dataclasses.replace(GOOD, **figures))


def test_the_table_shows_the_worst_of_each_device():
    rows = [row(registers=40), row(registers=64, tensor={"v_mfma_f32_32x32x8_f16": 2}), row("sm_90", registers=72)]
    rows = [dataclasses.replace(r, figures=dataclasses.replace(r.figures, mix={"integer": 9})) for r in rows]
    line = next(line for line in report.table(rows).splitlines() if line.startswith("| apply_kernel"))
    assert line.split("|")[2:5] == [" 2 / 1 ", " 64 / 72 ", " 0 "]
    assert line.split("|")[8] == " MFMA / - "


def test_the_table_shows_the_mix_of_the_longest_specialisation():
    rows = [row(mix={"float": 1}), row(mix={"tensor": 10, "global": 20, "shared": 5, "barrier": 5, "integer": 60})]
    assert report.table(rows).splitlines()[-1] == "| apply_kernel | 10/20/10/0/60 |"


def test_a_comparison_names_what_changed():
    old, new = [row(registers=40).as_json()], [row(registers=64).as_json(), row("sm_90").as_json()]
    changed, counts = report.compare(old, new)
    assert changed.startswith("resnet.kernels.batch_norm_add_relu.apply_kernel on sm_80, x:*fp16/16")
    assert changed.endswith(": registers 40 -> 64")
    assert counts == "1 specialisations are new, 0 are gone"


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_s_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--help"])
    assert stopped.value.code == 0 and "--compare" in capsys.readouterr().out


def test_in_the_interpreter_it_says_that_kernels_are_compiled(monkeypatch, capsys):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit) as stopped:
        report.main([])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "TRITON_INTERPRET: expected it unset" in error and error.count("\n") == 1
