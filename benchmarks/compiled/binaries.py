"""Compiles recorded launches for a device that need not be here, and reads registers, spills and instructions off them.

It counts instructions in the binary, not executions. Which argument an access belongs to is traced through the code
that the binary was assembled from, PTX for NVIDIA and LLVM IR for AMD, where pointers still have a name.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.compiled.launches import RecordedLaunch
from resnet.kernels.tuning import DEVICES, Device


@dataclass
class Figures:
    """What one specialisation, compiled for one device, asks of it."""

    error: str = ""  # why it does not compile; everything else is unset then
    registers: int = 0  # per thread
    spills: int = 0  # instructions that spill a register or load it back; on AMD, registers that are spilled
    stack: int = 0  # bytes per thread
    shared: int = 0  # bytes per block
    warps: int = 0  # per block
    occupancy: float = 0.0
    loads: dict[str, list[int]] = field(default_factory=dict)  # by argument, the widths of its accesses in bytes
    stores: dict[str, list[int]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # by "load 16" or "store 8", how many the binary has
    products: list[str] = field(default_factory=list)  # element types of the operands of its tl.dot
    tensor: dict[str, int] = field(default_factory=dict)  # tensor-core instructions by opcode
    barriers: int = 0
    mix: dict[str, int] = field(default_factory=dict)  # instructions by class

    @property
    def sixteen_bit_products(self) -> bool:
        return any(kind in ("f16", "bf16") for kind in self.products)

    @property
    def instructions(self) -> int:
        return sum(self.mix.values())


# ---- which argument an access belongs to -------------------------------------------------------------------------

_Accesses = tuple[dict[str, list[int]], dict[str, list[int]]]


class _Origins:
    """The pointer arguments that each register of a function may hold, from `from -> to` edges between registers."""

    def __init__(self) -> None:
        self._seeds: dict[str, set[str]] = defaultdict(set)
        self._users: dict[str, list[str]] = defaultdict(list)

    def seed(self, register: str, argument: str) -> None:
        self._seeds[register].add(argument)

    def flow(self, sources: Iterable[str], result: str) -> None:
        for source in sources:
            self._users[source].append(result)

    def resolve(self) -> dict[str, set[str]]:
        held: dict[str, set[str]] = defaultdict(set)
        work = [(register, argument) for register, arguments in self._seeds.items() for argument in arguments]
        while work:
            register, argument = work.pop()
            if argument not in held[register]:
                held[register].add(argument)
                work += [(user, argument) for user in self._users[register]]
        return held


def _attribute(origins: _Origins, accesses: Iterable[tuple[str, str, int]]) -> _Accesses:
    """(loads, stores) by argument, from accesses (kind, address register, bytes)."""
    held = origins.resolve()
    found: dict[str, dict[str, set[int]]] = {"load": defaultdict(set), "store": defaultdict(set)}
    for kind, register, width in accesses:
        for argument in held[register]:
            found[kind][argument].add(width)
    loads, stores = ({n: sorted(w) for n, w in sorted(found[kind].items())} for kind in ("load", "store"))
    return loads, stores


_PTX_REGISTER = re.compile(r"%[a-z]+\d+")
_PTX_ACCESS = re.compile(r"(ld|st)\.(?:[\w:]+\.)*?global((?:\.[\w:]+)*)\s+(.*)", re.DOTALL)
_PTX_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[\s*(%\w+)[^\]]*\],\s*(\w+)", re.DOTALL)
_PTX_PARAMETER = re.compile(r"ld\.param\S*\s+(%\w+),\s*\[\s*\w+_param_(\d+)\s*\]")


def ptx_accesses(ptx: str, arguments: Sequence[str]) -> _Accesses:
    """Widths of the global loads and stores of a PTX kernel, by argument.

    `arguments` names its parameters in order, "" for one that is no pointer.
    """
    origins, accesses = _Origins(), []
    for statement in re.sub(r"//[^\n]*", "", ptx[ptx.index("{") :]).split(";"):
        statement = re.sub(r"^\s*(?:\$\w+:\s*|\.loc[^\n]*\n\s*|\{\s*)*(?:@!?%\w+\s+)?", "", statement).strip()
        opcode = statement.split(None, 1)[0] if statement else "."
        if match := _PTX_PARAMETER.match(statement):
            if int(match[2]) < len(arguments) and arguments[int(match[2])]:
                origins.seed(match[1], arguments[int(match[2])])
        elif match := _PTX_ACCESS.match(statement):
            modifiers = match[2].split(".")
            count = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
            bits = next(int(m[1:]) for m in reversed(modifiers) if re.fullmatch(r"[bufs]\d+", m))
            address = re.search(r"\[\s*(%\w+)", match[3])[1]
            accesses.append(("load" if match[1] == "ld" else "store", address, count * bits // 8))
        elif match := _PTX_ASYNC.match(statement):
            accesses.append(("load", match[1], int(match[2], 0)))
        elif not opcode.startswith((".", "ld.", "st.", "atom.", "red.", "call")):
            result, *sources = _PTX_REGISTER.findall(statement) or [""]
            results = _PTX_REGISTER.findall(statement.split("}", 1)[0]) if "{" in statement.split(",")[0] else [result]
            for result in results:
                origins.flow(sources, result)
    return _attribute(origins, accesses)


_LLVM_VALUE = re.compile(r"%[\w.]+")
_LLVM_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}
_LLVM_LOAD = re.compile(r"load (?:volatile )?(<[^>]+>|\w+), ptr addrspace\(1\) (%[\w.]+)")
_LLVM_STORE = re.compile(r"store (?:volatile )?(<[^>]+>|\w+) .*, ptr addrspace\(1\) (%[\w.]+)")
_LLVM_BUFFER_LOAD = re.compile(
    r"call (<[^>]+>|\w+) @llvm\.amdgcn\.raw\.ptr\.buffer\.load\.\w+\(ptr addrspace\(8\) (%[\w.]+)"
)
_LLVM_BUFFER_STORE = re.compile(
    r"call void @llvm\.amdgcn\.raw\.ptr\.buffer\.store\.\w+\((<[^>]+>|\w+) .*?, ptr addrspace\(8\) (%[\w.]+)"
)
_LLVM_TO_SHARED = re.compile(
    r"call void @llvm\.amdgcn\.\S*load\S*lds\S*\(ptr addrspace\([18]\) (%[\w.]+), [^,]*, i32 (\d+)"
)


def _llvm_bytes(kind: str) -> int:
    count, element = re.fullmatch(r"(?:<(\d+) x )?(\w+)>?", kind).groups()
    return int(count or 1) * (_LLVM_BITS[element] if element in _LLVM_BITS else int(element[1:])) // 8


def llvm_accesses(llir: str, arguments: Sequence[str]) -> _Accesses:
    """The same for a kernel in AMD's LLVM IR, whose buffer instructions count too."""
    origins, accesses = _Origins(), []
    head, body = re.search(r"define amdgpu_kernel [^(]*\((.*?)\n(.*?)\n}", llir, re.DOTALL).groups()
    for value, argument in zip(re.findall(r"(%[\w.]+)(?:,|\))", head), arguments):
        if argument:
            origins.seed(value, argument)
    for line in body.splitlines():
        line = line.split("!dbg")[0].strip()
        if match := _LLVM_LOAD.search(line) or _LLVM_BUFFER_LOAD.search(line):
            accesses.append(("load", match[2], _llvm_bytes(match[1])))
        elif match := _LLVM_STORE.search(line) or _LLVM_BUFFER_STORE.search(line):
            accesses.append(("store", match[2], _llvm_bytes(match[1])))
        elif match := _LLVM_TO_SHARED.search(line):
            accesses.append(("load", match[1], int(match[2])))
        elif " = " in line and " = load " not in line:
            result, *sources = _LLVM_VALUE.findall(line)
            origins.flow(sources, result)
    return _attribute(origins, accesses)


# ---- instructions ------------------------------------------------------------------------------------------------

# The class of an instruction, by the beginning of its opcode. The first one that fits counts.
_CLASSES = {
    "cuda": (
        ("tensor", r"[A-Z]*MMA|UTC[A-Z]*MMA"),
        ("global", r"LDG|STG|UTMA|UBLKCP"),
        ("atomic", r"ATOM|RED(?!UX)|UTMARED"),
        ("shared", r"LDS|STS|LDT|STT|UTCCP"),
        ("local", r"LDL|STL"),
        ("barrier", r"BAR|SYNCS|ARRIVES|DEPBAR|LDGDEPBAR|WARPSYNC"),
        ("convert", r"F2F|I2F|F2I|HADD2\.F32|PRMT"),
        ("float", r"F(ADD|MUL|FMA|SET|SETP|SEL|MNMX|CHK)|H(ADD|MUL|FMA|SET|MNMX)|D(ADD|MUL|FMA|SETP)|MUFU"),
        ("branch", r"BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC|JMP|BREAK|NOP"),
        ("integer", r""),
    ),
    "hip": (
        ("tensor", r"v_s?mfmac?_"),
        ("atomic", r"(global|buffer|flat)_atomic"),
        ("global", r"(global|buffer|flat)_(load|store)"),
        ("shared", r"ds_"),
        ("local", r"scratch_"),
        ("barrier", r"s_barrier|s_waitcnt"),
        ("convert", r"v_cvt|v_perm|v_pack"),
        ("float", r"v_.*_(pk_)?(b?f16|f32|f64)"),
        ("branch", r"s_c?branch|s_endpgm|s_nop"),
        ("integer", r""),
    ),
}
_CLASSES = {backend: [(name, re.compile(p)) for name, p in classes] for backend, classes in _CLASSES.items()}


def _mix(opcodes: Iterable[str], backend: str) -> dict[str, int]:
    counts = Counter(next(n for n, pattern in _CLASSES[backend] if pattern.match(opcode)) for opcode in opcodes)
    return {name: counts[name] for name, _ in _CLASSES[backend] if counts[name]}


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SASS_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _sass_width(opcode: str) -> int:
    return next((_SASS_WIDTHS[part] for part in opcode.split(".") if part in _SASS_WIDTHS), 4)


def sass_figures(opcodes: Sequence[str]) -> dict[str, object]:
    """What the opcodes of NVIDIA's machine code say."""
    access = [("load" if o.startswith("LDG") else "store", _sass_width(o)) for o in opcodes if o[:3] in ("LDG", "STG")]
    return {
        "spills": sum(o.startswith(("LDL", "STL")) for o in opcodes),
        "widths": _counted(f"{kind} {width}" for kind, width in access),
        "tensor": _counted(o.split(".")[0] for o in opcodes if _CLASSES["cuda"][0][1].match(o)),
        "barriers": sum(o.startswith(("BAR.", "SYNCS.")) for o in opcodes),
        "mix": _mix(opcodes, "cuda"),
    }


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
_AMD_OPCODE = re.compile(r"\t((?:[vs]|ds|global|buffer|flat|scratch)_\w+)")


def amdgcn_figures(text: str) -> dict[str, object]:
    """What AMD's assembly and the metadata at its end say."""
    opcodes = [match[1] for line in text.splitlines() if (match := _AMD_OPCODE.match(line))]
    access = [m for o in opcodes if (m := re.match(r"(?:global|buffer|flat)_(load|store)_(dword(?:x\d)?|[a-z]+)", o))]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # noqa: E731
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "stack": number("private_segment_fixed_size"),
        "widths": _counted(f"{kind} {_AMD_WIDTHS.get(size, 1)}" for kind, size in (m.groups() for m in access)),
        "tensor": _counted(o for o in opcodes if _CLASSES["hip"][0][1].match(o)),
        "barriers": opcodes.count("s_barrier"),
        "mix": _mix(opcodes, "hip"),
    }


def _machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin: its ELF sections .text.*"""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    start = sections[names][4]
    named = [(cubin[start + s[0] : cubin.index(b"\0", start + s[0])], s) for s in sections]
    return b"".join(cubin[s[4] : s[4] + s[5]] for name, s in named if name.startswith(b".text."))


def disassemble(cubins: Sequence[bytes], arch: int) -> list[list[str]]:
    """The opcodes of each cubin. One call of nvdisasm does for all, since it takes most of its time to start."""
    from triton import knobs
    from triton.backends.nvidia.compiler import sm_arch_from_capability

    codes = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        name = sm_arch_from_capability(arch).replace("sm_", "SM")
        command = [knobs.nvidia.nvdisasm.path, "--binary", name, file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [(int(address, 16), opcode) for address, opcode in _SASS_LINE.findall(text)]
    opcodes, position, end = [], 0, 0
    for code in codes:
        first, end = position, end + len(code)
        while position < len(found) and found[position][0] < end:
            position += 1
        opcodes.append([opcode for _, opcode in found[first:position]])
    return opcodes


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))


# ---- a launch, compiled and read ---------------------------------------------------------------------------------

_DOT = re.compile(r"tt\.dot(?:_scaled)? .*?: tensor<(?:\d+x)+(\w+)[,>]")


def _compile(launch: RecordedLaunch, device: Device):
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch.function(), launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=device.target, options=launch.options)


def _read(launch: RecordedLaunch, device: Device) -> tuple[Figures, bytes | None]:
    """(figures, cubin). The figures are what is known before the disassembly."""
    try:
        compiled = _compile(launch, device)
    except Exception as error:
        return Figures(error=f"{type(error).__name__}: {error}".strip()), None
    code, cubin = compiled.asm, None
    arguments = [n if kind.startswith("*") else "" for n, kind in launch.signature.items() if kind != "constexpr"]
    figures = Figures(shared=compiled.metadata.shared, products=sorted(set(_DOT.findall(code["ttir"]))))
    if device.backend == "cuda":
        cubin = code["cubin"]
        figures.warps = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", code["ptx"])[1]) // device.warp
        figures.registers, figures.stack = _registers_and_stack(cubin)
        figures.loads, figures.stores = ptx_accesses(code["ptx"], arguments)
    else:
        figures.warps = compiled.metadata.num_warps
        figures.loads, figures.stores = llvm_accesses(code["llir"], arguments)
        vars(figures).update(amdgcn_figures(code["amdgcn"]))
    figures.occupancy = device.occupancy(figures.registers, figures.warps, figures.shared)
    return figures, cubin


def read(jobs: Sequence[tuple[RecordedLaunch, str]]) -> list[Figures]:
    """Figures of each (launch, name of a device in `tuning.DEVICES`)."""
    results = [_read(launch, DEVICES[name]) for launch, name in jobs]
    for device in DEVICES.values():
        mine = [r for r, (_, name) in zip(results, jobs, strict=True) if name == device.name and r[1] is not None]
        if mine:
            for (figures, _), opcodes in zip(mine, disassemble([cubin for _, cubin in mine], device.arch), strict=True):
                vars(figures).update(sass_figures(opcodes))
    return [figures for figures, _ in results]
