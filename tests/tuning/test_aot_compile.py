"""What every shipped configuration compiles to, for chips that need not be there; and the reader of machine code."""

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tritontower.kernels.runtime import tables
from tritontower.kernels.runtime.config import ARCHITECTURES, CompileSpec
from tritontower.tuning import static
from tritontower.tuning.build_tables import published_tasks
from tritontower.tuning.compile import aot_compile
from tritontower.tuning.compile.aot_compile import Order, compile_orders
from tritontower.tuning.compile.disassembly import Instruction, hot_loop, read_amd
from tritontower.tuning.static import StaticReport, compile_ahead, discover, problems, table
from tritontower.tuning.tasks import Task

triton = pytest.importorskip("triton", reason="compiling needs Triton, which ships for Linux only")

OFTEN = ("sm_80", "sm_90", "sm_100", "gfx942")
SELDOM = tuple(name for name in ARCHITECTURES if name not in OFTEN)


FEW_SPILLS = 80
"""What a configuration may spill under another compiler than the one it was chosen with: several stand at the limit of
255 registers, and every Triton release allocates them a little differently."""


def document() -> str:
    return static.document_path().read_text(encoding="utf-8")


def kept_version() -> str:
    """The Triton that the kept table was made with."""
    found = re.search(r"with Triton (\S+);", document())
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def reports() -> dict[str, list[StaticReport]]:
    """Filled by the first test that asks for an architecture: compiling is what takes the time here."""
    return {}


def compiled(reports: dict[str, list[StaticReport]], architecture: str) -> list[StaticReport]:
    if architecture not in reports:
        reports[architecture] = compile_ahead(discover(architecture), architecture, workers=2)
    return reports[architecture]


@pytest.mark.parametrize("architecture", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)])
class TestShippedConfigurations:
    def test_they_compile_within_the_limits(self, reports, architecture):
        """No spills, shared memory that fits, and the right tensor-core instructions where there is a dot."""
        found = compiled(reports, architecture)
        assert found
        if kept_version() != triton.__version__:
            found = [replace(report, spills=0, stack=0) if report.spills <= FEW_SPILLS else report for report in found]
        broken = {f"{report.kernel}: {report.name}": problems(report) for report in found if problems(report)}
        assert not broken

    def test_the_kept_table_tells_the_truth(self, reports, architecture):
        kept = [line for line in document().splitlines() if line.startswith(f"| {architecture} |")]
        lines = table(compiled(reports, architecture)).splitlines()[2:]
        if kept_version() != triton.__version__:
            # The list of configurations is ours and stays; what it compiles to is the other compiler's.
            kept, lines = ([line.split("|")[1:4] for line in each] for each in (kept, lines))
        assert kept == lines, "regenerate with: python -m tritontower.tuning.static --write"


@pytest.mark.parametrize(("heads", "most"), [("64 = 64", 4.8), ("72 in 80 = 64 + 16", 4.0), ("80 = 64 + 16", 5.5)])
def test_attention_takes_few_instructions_a_score_on_hopper(heads, most):
    """Of the best variant in bf16, by the kept table, which is held to the truth above."""
    lines = [line.split("|") for line in document().splitlines() if line.startswith("| sm_90 | attention_")]
    named = [line for line in lines if line[3].startswith(f" bf16 head {heads}, ") and "repair" not in line[3]]
    assert min(float(line[9]) for line in named) <= most


def test_every_kernel_that_is_launched_is_in_a_specification():
    """In the list of its own file or in that of the operation it is a form of; device.py holds what others call."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in static.document_path().parent.glob("*.py")}
    launching = {name for name, text in files.items() if re.search(r"^def _\w+_kernel\(", text, re.MULTILINE)}
    assert launching
    compiled_files = {static.kernel_name(spec) for architecture in ARCHITECTURES for spec in discover(architecture)}
    assert launching <= compiled_files


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specifications_are_complete(architecture):
    """Every argument of the kernel is either a typed run-time argument or a compile-time constant, and named once."""
    specs = discover(architecture)
    assert len({(static.kernel_name(spec), spec.name) for spec in specs}) == len(specs)
    for spec in specs:
        runtime = set(spec.signature) - set(spec.constants)
        assert runtime | set(spec.constants) == set(spec.kernel.arg_names), spec.name
        assert set(spec.divisible_by_16) <= set(spec.kernel.arg_names), spec.name
        assert spec.elements > 0, spec.name


def some_spec() -> CompileSpec:
    return discover("sm_80", ["activations"])[0]


def test_a_specification_that_does_not_compile_costs_only_itself():
    good = some_spec()
    bad = replace(good, name="bad", signature=dict.fromkeys(good.signature, "*nonsense"))
    first, broken, last = compile_ahead([good, bad, good], "sm_80")
    assert first == last
    assert first.error is None
    assert broken.name == "bad"
    assert problems(broken)[0].startswith("does not compile: ")
    assert broken.error in table([broken])


def test_a_compiler_that_dies_costs_only_the_specification_it_was_at(monkeypatch):
    """The child ends without a word at the second of three; a new one takes up the third."""
    monkeypatch.setattr(
        static,
        "_CHILD",
        "import os\n"
        "from tritontower.tuning import static\n"
        "compile_one = static._compile\n"
        "static._compile = lambda spec, arch: os._exit(134) if spec.name == 'deadly' else compile_one(spec, arch)\n"
        "static._serve()\n",
    )
    good = some_spec()
    first, dead, last = compile_ahead([good, replace(good, name="deadly"), good], "sm_80")
    assert first == last
    assert first.registers > 0
    assert dead.error.startswith("the compiler's process ended with 134: ")


def test_workers_keep_the_order():
    specs = discover("sm_80", ["activations"])
    assert [report.name for report in compile_ahead(specs, "sm_80", workers=2)] == [spec.name for spec in specs]


def test_nothing_to_compile():
    assert compile_ahead([], "sm_80", workers=2) == []


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown architecture 'sm_70'; known are sm_80"):
        compile_ahead([], "sm_70")
    with pytest.raises(ValueError, match="no kernel file 'nonsense' lists compile specifications; there are"):
        discover("sm_80", ["nonsense"])


SHIPPED = sorted(path.stem for path in (static.document_path().parent / "tuned").glob("*.json"))


@pytest.mark.parametrize("sample", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["sample", "all"])
@pytest.mark.parametrize("name", SHIPPED)
class TestShippedTables:
    def test_their_configurations_compile_within_the_limits(self, name, sample):
        """Through the real launch path, for the towers that they were found for."""
        found = tables.read_table(static.document_path().parent / "tuned" / f"{name}.json")
        architecture = found.key["architecture"]
        tasks = {task.key: task for task in published_tasks()}
        orders: dict[Any, Order] = {}
        for entry in found.entries:
            if tables.unproven(entry["config"]) == "the vendor's own product":
                continue  # there is nothing to compile
            facts = {part: tuple(sorted(entry[part].items())) for part in ("constants", "sizes")}
            key = Task(entry["kernel"], entry["dtype"], **facts, facts=(), node="").key
            assert key in tasks, f"no published tower has {key}"
            kind = (entry["kernel"], entry["config"].get("variant"), entry["config"].get("operands"))
            orders.setdefault(
                kind if sample else key, Order(tasks[key], tuple(sorted(entry["config"].items())), architecture)
            )
        assert orders
        broken = {}
        todo = list(orders.values())
        for index, result in compile_orders(todo, workers=2):
            order = todo[index]
            wrong = aot_compile.problems(result, architecture, order.task.dtype, products=order.task.kernel != "norm")
            if found.key["triton"] != triton.__version__:
                wrong = [each for each in wrong if not each.startswith("spills")]
            if wrong:
                broken[order.task.title] = wrong
        assert not broken


def test_threads_are_those_of_the_launch():
    """Warps that only fetch count for what fits a multiprocessor, and not among those that compute."""
    assert static._threads(".maxntid 128\n.reqntid 384\n", 4) == 384
    assert static._threads(".maxntid 128\n", 4) == 128
    assert static._working(384, 128) == 256
    assert static._working(256, 256) == 256
    code = static.MachineCode(168, 0, 0, ())
    assert static._occupancy(code, 131_072, 12, "sm_90") == 1
    assert static._occupancy(code, 65_536, 4, "sm_90") == 3


@pytest.mark.parametrize("kernel", ["attention", "linear"])
def test_products_and_attention_have_a_prediction(kernel):
    """Between a tenth of the H200's dense rate and all of it, and only where tensor cores are used."""
    specs = [spec for spec in discover("sm_90", [kernel]) if "BLOCK_KEYS" in spec.constants or "EVEN" in spec.constants]
    wanted = [next(spec for spec in specs if spec.tensor_core), next(spec for spec in specs if not spec.tensor_core)]
    with_products, without = compile_ahead(wanted, "sm_90")
    assert 95 < with_products.predicted_tflops < 950
    assert f"| {with_products.predicted_tflops:.0f} |" in table([with_products])
    assert without.predicted_tflops is None
    assert table([without]).endswith("| – |")


REPORT = StaticReport(
    kernel="k",
    name="n",
    architecture="sm_90",
    triton="0",
    wants_tensor_core=True,
    num_warps=4,
    tensor_core={"HGMMA": 2},
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 3, "stack": 8}, "spills registers (3 instructions, 8 bytes of stack)"),
        ({"shared_memory": 300_000}, "takes 300000 bytes of shared memory, the limit is 232448"),
        ({"tensor_core": {"HMMA": 2}}, "has no HGMMA instruction"),
        ({"error": "of itself"}, "does not compile: of itself"),
    ],
)
def test_rules(change, problem):
    assert problems(REPORT) == []
    assert problems(replace(REPORT, **change)) == [problem]


def program(text: str) -> tuple[Instruction, ...]:
    """One instruction per word: ``label:OPCODE->target!`` with everything but the opcode optional; ``!`` never falls."""
    parts = [re.fullmatch(r"(?:(\w+):)?(\w+)(?:->(\w+))?(!)?", word) for word in text.split()]
    return tuple(Instruction(part[2], part[1], part[3], part[4] is None) for part in parts if part)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("MOV HMMA EXIT!", None),
        ("MOV a:HMMA ADD BRA->a EXIT!", 3),
        ("MOV a:ADD BRA->a HMMA EXIT!", None),
        # A loop around the loop is not the hot one.
        ("o:MOV a:HMMA BRA->a ADD BRA->o EXIT!", 2),
        # Nor is the wait for one of many.
        ("a:HMMA HMMA w:HMMA BRA->w BRA->a EXIT!", 5),
        # The retry of a wait, moved behind the end of the kernel, belongs to the loop it returns to.
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
    with pytest.raises(ValueError, match="no vgpr_spill_count"):
        read_amd(".vgpr_count: 3 .sgpr_spill_count: 0")


def test_command_line_from_an_interpreting_parent():
    """TRITON_INTERPRET is the parent's business: the compiler's process does without."""
    command = [sys.executable, "-m", "tritontower.tuning.static", "--architecture", "sm_80", "--kernel", "activations"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| architecture | kernel |")
    assert "| sm_80 | elementwise |" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--kernel", "nonsense"], ["--architecture", "sm_70"], ["--write", "--kernel", "activations"]]
)
def test_command_line_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as refusal:
        static.main(arguments)
    assert refusal.value.code == 2
    assert "usage:" in capsys.readouterr().err
