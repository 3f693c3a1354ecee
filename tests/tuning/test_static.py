"""Static report: the default configurations compile within the limits, and ``kernels/STATIC.md`` shows the result."""

import re
from dataclasses import replace

import pytest

from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.tuning import static
from tritontower.tuning.static import StaticReport, compile_specs, document_path, kernel_module, list_specs, table

triton = pytest.importorskip("triton", reason="compiling needs Triton, which ships for Linux only")

FEW_SPILLS = 80
"""Allowed spills with another compiler: several configurations use all 255 registers, and each Triton release allocates
them a little differently."""


def document() -> str:
    return document_path().read_text(encoding="utf-8")


def kept_version() -> str:
    """Returns the Triton version of the kept table."""
    found = re.search(r"with Triton (\S+);", document())
    assert found is not None
    return found[1]


def kept_lines(architecture: str) -> list[str]:
    return [line for line in document().splitlines() if line.startswith(f"| {architecture} |")]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_compile_as_the_kept_table_says(architecture):
    """No spills, shared memory that fits, and tensor-core instructions in every dot."""
    found = compile_specs(list_specs(architecture), architecture, workers=2)
    if kept_version() == triton.__version__:
        regenerate = "regenerate with: python -m tritontower.tuning.static --write"
        assert kept_lines(architecture) == table(found).splitlines()[2:], regenerate
    else:
        # The kept machine code is another compiler's.
        for index, report in enumerate(found):
            if report.compiled and report.compiled.spills <= FEW_SPILLS:
                found[index] = replace(report, compiled=replace(report.compiled, spills=0, stack=0))
    assert {f"{report.kernel}: {report.name}": report.problems for report in found if report.problems} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kept_table_lists_every_default(architecture):
    """Checked without compiling, so that a changed default is noticed at once."""
    listed = [tuple(cell.strip() for cell in line.split("|")[2:4]) for line in kept_lines(architecture)]
    assert listed == [(kernel_module(spec), spec.name) for spec in list_specs(architecture)]


@pytest.mark.parametrize(("heads", "most"), [("64 = 64", 4.8), ("72 in 80 = 64 + 16", 4.0), ("80 = 64 + 16", 5.5)])
def test_attention_takes_few_instructions_per_score_on_sm_90(heads, most):
    """Checked in the kept table for the best variant in bf16."""
    lines = [line.split("|") for line in kept_lines("sm_90") if line.startswith("| sm_90 | attention.")]
    named = [line for line in lines if line[3].startswith(f" bf16 head {heads}, ") and "recompute" not in line[3]]
    assert min(float(line[9]) for line in named) <= most


def test_every_launched_kernel_has_a_specification():
    folder = document_path().parent
    launching = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.glob("*/*.py")
        if re.search(r"^def _\w+_kernel\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert launching
    assert launching <= {kernel_module(spec) for architecture in ARCHITECTURES for spec in list_specs(architecture)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specifications_are_complete(architecture):
    """Every argument of the kernel is a typed run-time argument or a compile-time constant."""
    specs = list_specs(architecture)
    assert len({(kernel_module(spec), spec.name) for spec in specs}) == len(specs)
    for spec in specs:
        runtime = set(spec.signature) - set(spec.constants)
        assert runtime | set(spec.constants) == set(spec.kernel.arg_names), spec.name
        assert set(spec.divisible_by_16) <= set(spec.kernel.arg_names), spec.name
        assert spec.elements > 0, spec.name


def test_a_specification_that_fails_costs_only_itself(monkeypatch):
    """One does not compile, one ends the compiler's process; the order is kept."""
    monkeypatch.setattr(
        static,
        "CHILD",
        "import os, sys\n"
        "from tritontower.tuning import static\n"
        "read = static.read_compiled\n"
        "static.read_compiled = lambda name, compiled, architecture, warps: "
        "os._exit(134) if warps == 2 else read(name, compiled, architecture, warps)\n"
        "static.serve()\n",
    )
    good = list_specs("sm_80", ["rowwise.activations"])[0]
    bad = replace(good, name="bad", signature=dict.fromkeys(good.signature, "*nonsense"))
    deadly = replace(good, name="deadly", num_warps=2)
    first, broken, dead, last = compile_specs([good, bad, deadly, good], "sm_80", workers=1)
    assert first == last
    assert first.compiled is not None
    assert first.problems == []
    assert first.instructions_per_element > 0
    assert broken.problems[0].startswith("does not compile: ")
    assert broken.error in table([broken])
    assert dead.error.startswith("the compiler's process ended with 134: ")


def test_reports_without_a_loop_count_the_whole_program():
    report = StaticReport("gemm.linear", "name", "sm_90", True, 1000, None, "error")
    assert report.instructions_per_element is None
    assert report.problems == ["does not compile: error"]


def test_unknown_names_are_rejected():
    assert compile_specs([], "sm_80", workers=2) == []
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*, got 'sm_70'"):
        compile_specs([], "sm_70")
    with pytest.raises(ValueError, match=r"kernel must be one of .*gemm\.linear.*, got 'nonsense'"):
        list_specs("sm_80", ["nonsense"])


def test_the_command_line_prints_a_table(capsys):
    """It runs although this process may interpret Triton: the child's environment has no ``TRITON_INTERPRET``."""
    assert static.main(["--architecture", "sm_80", "--kernel", "rowwise.gather"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("| architecture | kernel |")
    assert "| sm_80 | rowwise.gather |" in output


@pytest.mark.parametrize(
    "arguments", [["--kernel", "nonsense"], ["--architecture", "sm_70"], ["--write", "--kernel", "rowwise.gather"]]
)
def test_the_command_line_rejects_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as refusal:
        static.main(arguments)
    assert refusal.value.code == 2
    assert "usage:" in capsys.readouterr().err
