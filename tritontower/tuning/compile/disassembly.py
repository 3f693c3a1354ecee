"""Disassembly: parses the SASS of a cubin (NVIDIA) or AMD assembly text into instructions and loops.

The NVIDIA tools come with Triton.  Loops are found in the control-flow graph, not in the order of the text: compilers move
the retry of a wait after the last instruction of the kernel, and jump back into the loop from there.
"""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

_TENSOR_CORE = re.compile(r"HMMA|HGMMA|IMMA|QMMA|QGMMA|DMMA|UTC\w*MMA|v_s?mfmac?_")
_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(?:\.\w+)*([^;]*);")
_SASS_LABEL = re.compile(r"^(\.L\w+):")
_SASS_TARGET = re.compile(r"\((\.L\w+)\)")
_AMD_LINE = re.compile(r"^\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)\s*([^;]*)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")


@dataclass(frozen=True)
class Instruction:
    """Opcode and control flow of one instruction."""

    opcode: str
    label: str | None = None
    """Label before it."""
    target: str | None = None
    """Label that it may jump to."""
    falls_through: bool = True
    """Whether the next instruction may follow it."""

    @property
    def is_tensor_core(self) -> bool:
        """True for a matrix multiply-add."""
        return _TENSOR_CORE.match(self.opcode) is not None


@dataclass(frozen=True)
class MachineCode:
    """Registers, spills, stack and instructions of one compiled kernel."""

    registers: int
    spills: int
    stack: int
    instructions: tuple[Instruction, ...]

    @property
    def tensor_core(self) -> dict[str, int]:
        """Opcode of each kind of tensor-core instruction → number of occurrences in the code."""
        return dict(Counter(each.opcode for each in self.instructions if each.is_tensor_core))


def hot_loop(instructions: tuple[Instruction, ...]) -> int | None:
    """Returns the length of the innermost loop with tensor-core instructions, or ``None``.

    That is the natural loop with the most tensor-core instructions that contains no other such loop.  A loop that waits for
    a single instruction does not count.
    """
    loops = [
        (frozenset(body), sum(instructions[index].is_tensor_core for index in body))
        for body in _natural_loops(instructions)
    ]
    innermost = [
        (-weight, len(body))
        for body, weight in loops
        if weight and not any(inner < body and (count > 1 or 2 * count > weight) for inner, count in loops)
    ]
    return min(innermost)[1] if innermost else None


def _natural_loops(instructions: tuple[Instruction, ...]) -> list[list[int]]:
    """Returns the instruction indices of every natural loop (Aho, Lam, Sethi and Ullman, *Compilers*, section 9.6)."""
    blocks = _basic_blocks(instructions)
    block_at = {instructions[block[0]].label: number for number, block in enumerate(blocks)}
    successors: list[set[int]] = []
    for number, block in enumerate(blocks):
        last = instructions[block[-1]]
        following = {number + 1} if last.falls_through and number + 1 < len(blocks) else set()
        target = block_at.get(last.target) if last.target else None
        successors.append(following if target is None else following | {target})
    predecessors = [
        {other for other, following in enumerate(successors) if number in following} for number in range(len(blocks))
    ]
    dominators = _dominators(predecessors)
    members: dict[int, set[int]] = {}
    for number, following in enumerate(successors):
        for header in following & dominators[number]:
            members.setdefault(header, {header}).update(_reaching(number, header, predecessors))
    return [[index for number in sorted(loop) for index in blocks[number]] for loop in members.values()]


def _basic_blocks(instructions: tuple[Instruction, ...]) -> list[range]:
    """Returns runs of instructions that are entered only at the first and left only after the last."""
    starts = {0} | {
        index
        for index in range(1, len(instructions))
        if instructions[index].label or instructions[index - 1].target or not instructions[index - 1].falls_through
    }
    bounds = [*sorted(starts), len(instructions)]
    return [range(first, last) for first, last in itertools.pairwise(bounds) if first < last]


def _dominators(predecessors: list[set[int]]) -> list[set[int]]:
    """Returns for each block the blocks on every path from the entry to it, itself included."""
    everything = set(range(len(predecessors)))
    dominators = [{0}] + [set(everything) for _ in predecessors[1:]]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(predecessors)):
            before = [dominators[predecessor] for predecessor in predecessors[number]]
            found = {number} | (set.intersection(*before) if before else everything)
            if found != dominators[number]:
                dominators[number] = found
                changed = True
    return dominators


def _reaching(latch: int, header: int, predecessors: list[set[int]]) -> set[int]:
    """Returns the blocks from which ``latch`` is reached without passing ``header``."""
    found = {header}
    waiting = [latch]
    while waiting:
        block = waiting.pop()
        if block not in found:
            found.add(block)
            waiting.extend(predecessors[block])
    return found


def read_nvidia(cubin: bytes) -> MachineCode:
    """Disassembles a cubin with ``cuobjdump`` and ``nvdisasm`` from Triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", file.name], text=True)
        listing = subprocess.check_output([tools / "nvdisasm", "-c", "-ndf", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"no register count in the output of cuobjdump: {usage[:200]!r}")
    instructions = _parse_sass(listing)
    spills = sum(each.opcode in ("LDL", "STL") for each in instructions)
    return MachineCode(int(found[1]), spills, int(found[2]), instructions)


def read_amd(assembly: str) -> MachineCode:
    """Parses AMD assembly text with its metadata block."""

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise ValueError(f"no {name} in the metadata of the assembly")
        return int(found[1])

    spills = count("vgpr_spill_count") + count("sgpr_spill_count")
    # .vgpr_count includes the accumulation registers of the unified file (gfx90a and later).
    return MachineCode(count("vgpr_count"), spills, count("private_segment_fixed_size"), _parse_amd(assembly))


def _parse_sass(listing: str) -> tuple[Instruction, ...]:
    def parse(found: re.Match[str], label: str | None) -> Instruction:
        predicate, opcode, operands = found.groups()
        # BRA.U has its predicate as an operand; a jump or an exit without a predicate is always taken.
        conditional = predicate is not None or re.search(r"\bU?P\d", operands) is not None
        target = _SASS_TARGET.search(operands) if opcode == "BRA" else None
        return Instruction(opcode, label, target and target[1], conditional or opcode not in ("BRA", "EXIT", "RET"))

    return _parse(listing, _SASS_LABEL, _SASS_LINE, parse)


def _parse_amd(assembly: str) -> tuple[Instruction, ...]:
    def parse(found: re.Match[str], label: str | None) -> Instruction:
        opcode, operands = found[1], found[2].strip()
        target = operands if opcode.startswith(("s_branch", "s_cbranch")) else None
        return Instruction(opcode, label, target, opcode not in ("s_branch", "s_endpgm"))

    return _parse(assembly, _AMD_LABEL, _AMD_LINE, parse)


def _parse(
    text: str,
    label_line: re.Pattern[str],
    instruction_line: re.Pattern[str],
    parse: Callable[[re.Match[str], str | None], Instruction],
) -> tuple[Instruction, ...]:
    instructions: list[Instruction] = []
    label: str | None = None
    renamed: dict[str | None, str] = {}
    for line in text.splitlines():
        if found := label_line.match(line):
            # Several labels before one instruction become the first of them.
            label = label or found[1]
            renamed[found[1]] = label
        elif found := instruction_line.match(line):
            instructions.append(parse(found, label))
            label = None
    # A jump out of the code loses its target.
    return tuple(replace(each, target=renamed.get(each.target)) for each in instructions)
