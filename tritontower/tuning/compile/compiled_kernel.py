"""Properties of a compiled kernel: registers, spills, shared memory, occupancy, and the instructions of its hot loop."""

import re
from dataclasses import dataclass

from tritontower.kernels.runtime.config import SHARED_MEMORY_LIMIT

from .disassembly import hot_loop, read_amd, read_nvidia
from .recording import Launch

TENSOR_CORE_PREFIX = {
    "sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma", "gfx950": "v_mfma"
}  # fmt: skip
"""Prefix of the opcodes that use an architecture's tensor cores at full rate."""


@dataclass(frozen=True)
class CompiledKernel:
    """Properties of the machine code of one kernel."""

    kernel: str
    num_warps: int
    threads: int
    """Threads of a program; more than those of ``num_warps`` if warps of their own load the data."""
    registers: int
    """Per thread; on AMD vector registers, accumulation registers included."""
    spills: int
    """Instructions that move registers to and from local memory (on AMD: spilled registers)."""
    stack: int
    """Bytes of local memory per thread."""
    shared_memory: int
    """Bytes per program."""
    occupancy: int
    """Programs that fit one multiprocessor at the same time."""
    tensor_core: dict[str, int]
    """Opcode → number of occurrences in the code."""
    instructions: int
    loop_instructions: int | None
    """Length of the hot loop: the innermost loop with tensor-core instructions."""

    def computing_threads(self, architecture: str) -> int:
        """Returns the threads that compute; a warp-specialized program has four further warps that load the data."""
        asked = self.num_warps * (64 if architecture.startswith("gfx") else 32)
        return self.threads if self.threads <= asked else max(asked, self.threads - 128)

    def problems(self, architecture: str, *, wants_tensor_core: bool) -> list[str]:
        """Lists the rules that the kernel breaks; empty if its configuration may be used."""
        broken = []
        if self.spills or self.stack:
            broken.append(f"spills registers ({self.spills} instructions, {self.stack} bytes of stack)")
        limit = SHARED_MEMORY_LIMIT[architecture]
        if self.shared_memory > limit:
            broken.append(f"takes {self.shared_memory} bytes of shared memory, the limit is {limit}")
        prefix = TENSOR_CORE_PREFIX[architecture]
        if wants_tensor_core and not any(opcode.startswith(prefix) for opcode in self.tensor_core):
            broken.append(f"has no {prefix} instruction")
        return broken


def read_compiled(launch: Launch, architecture: str) -> CompiledKernel:
    """Reads the properties of a recorded launch."""
    compiled, num_warps = launch.compiled, int(launch.compiled.metadata.num_warps)
    is_amd = architecture.startswith("gfx")
    code = read_amd(compiled.asm["amdgcn"]) if is_amd else read_nvidia(compiled.asm["cubin"])
    shared_memory = int(compiled.metadata.shared)
    threads = num_warps * 64 if is_amd else count_threads(compiled.asm["ptx"], num_warps)
    return CompiledKernel(
        kernel=launch.kernel,
        num_warps=num_warps,
        threads=threads,
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        shared_memory=shared_memory,
        occupancy=occupancy(code.registers, shared_memory, threads // (64 if is_amd else 32), architecture),
        tensor_core=code.tensor_core,
        instructions=len(code.instructions),
        loop_instructions=hot_loop(code.instructions),
    )


def count_threads(ptx: str, num_warps: int) -> int:
    """Returns the threads of a program; the compiler may add warps that load data to ``num_warps``."""
    found = re.search(r"\.reqntid\s+(\d+)", ptx)
    return int(found[1]) if found else num_warps * 32


def occupancy(registers: int, shared_memory: int, num_warps: int, architecture: str) -> int:
    """Returns how many programs fit one multiprocessor, from the limits in the CUDA and CDNA 3 manuals."""
    if architecture.startswith("gfx"):
        # Four SIMDs of 512 vector registers per lane (allocated in eights) and at most 8 waves each.
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // num_warps, SHARED_MEMORY_LIMIT[architecture] // max(1, shared_memory))
    capacity = {"sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}[architecture] * 1024
    warps = 48 if architecture in ("sm_89", "sm_120") else 64
    registers_per_warp = -(-registers * 32 // 256) * 256
    # The system reserves 1 KB of shared memory for each program.
    return min(65536 // (registers_per_warp * num_warps), capacity // (shared_memory + 1024), warps // num_warps, 32)
