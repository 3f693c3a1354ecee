"""Machine code: parsing of instructions and loops, and the rules for a compiled kernel."""

import re

import pytest
from support.tuning import QWEN2, compiled, find_task, tasks_for

from tritontower.tuning.compile.aot_compile import CompileResult
from tritontower.tuning.compile.compiled_kernel import count_threads, occupancy
from tritontower.tuning.compile.disassembly import Instruction, hot_loop, read_amd


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 3, "stack": 8}, "spills registers (3 instructions, 8 bytes of stack)"),
        ({"shared_memory": 300_000}, "takes 300000 bytes of shared memory, the limit is 232448"),
        ({"tensor_core": {"HMMA": 2}}, "has no HGMMA instruction"),
    ],
)
def test_rules(change, problem):
    assert compiled().problems("sm_90", wants_tensor_core=True) == []
    assert compiled(**change).problems("sm_90", wants_tensor_core=True) == [problem]
    assert compiled(tensor_core={}).problems("sm_90", wants_tensor_core=False) == []
    task, reduce_launch = find_task(tasks_for(QWEN2), "mlp.up"), compiled(tensor_core={})
    assert CompileResult((compiled(), reduce_launch)).problems(task, "sm_90") == []
    assert CompileResult((reduce_launch, compiled(**change))).problems(task, "sm_90") == [problem]


def test_warps_that_load_data_do_not_compute():
    """They count for the occupancy of a multiprocessor."""
    assert count_threads(".maxntid 128\n.reqntid 384\n", 4) == 384
    assert count_threads(".maxntid 128\n", 4) == 128
    assert compiled(num_warps=4, threads=384).computing_threads("sm_90") == 256
    assert compiled(num_warps=8, threads=256).computing_threads("sm_90") == 256
    assert compiled(num_warps=4, threads=256).computing_threads("gfx942") == 256
    assert occupancy(168, 131_072, 12, "sm_90") == 1
    assert occupancy(168, 65_536, 4, "sm_90") == 3
    assert occupancy(128, 0, 4, "gfx942") == 4


def program(text: str) -> tuple[Instruction, ...]:
    """One instruction per word: ``label:OPCODE->target!``, all but the opcode optional; ``!`` never falls through."""
    parts = [re.fullmatch(r"(?:(\w+):)?(\w+)(?:->(\w+))?(!)?", word) for word in text.split()]
    return tuple(Instruction(part[2], part[1], part[3], part[4] is None) for part in parts if part)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("MOV HMMA EXIT!", None),
        ("MOV a:HMMA ADD BRA->a EXIT!", 3),
        ("MOV a:ADD BRA->a HMMA EXIT!", None),
        # An outer loop is not the hot one.
        ("o:MOV a:HMMA BRA->a ADD BRA->o EXIT!", 2),
        # A loop that waits for one of many instructions is not either.
        ("a:HMMA HMMA w:HMMA BRA->w BRA->a EXIT!", 5),
        # The retry of a wait, moved after the end of the kernel, belongs to the loop it returns to.
        ("MOV a:HMMA BRA->r back:HMMA BRA->a EXIT! r:TRY BRA->back!", 6),
        # A forward branch around code that never falls into the next block closes no loop.
        ("MOV BRA->b HMMA BRA->end! b:HMMA BRA->end! end:EXIT!", None),
    ],
)
def test_hot_loop(text, length):
    assert hot_loop(program(text)) == length


def test_amd_assembly():
    assembly = """
    v_mov_b32_e32 v0, 0
.LBB0_1:                                ; %loop
    v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
    s_add_i32 s0, s0, 1                 ; a comment
    s_cbranch_scc0 .LBB0_1
    s_endpgm
    .vgpr_count:     24
    .vgpr_spill_count: 1
    .sgpr_spill_count: 2
    .private_segment_fixed_size: 12
"""
    code = read_amd(assembly)
    assert (code.registers, code.spills, code.stack) == (24, 3, 12)
    assert code.instructions[0].opcode == "v_mov_b32_e32"
    assert len(code.instructions) == 5
    assert code.tensor_core == {"v_mfma_f32_32x32x8_bf16_1k": 1}
    assert hot_loop(code.instructions) == 3
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        read_amd(".vgpr_count: 3 .sgpr_spill_count: 0")
