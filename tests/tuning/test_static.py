"""Static report: what real towers launch compiles within the limits, and ``kernels/STATIC.md`` is complete."""

import json
import re
from dataclasses import replace

import pytest
from support.processes import run_python

from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.tuning import static
from tritontower.tuning.static import (
    KNOWN_SPILLS,
    KernelReport,
    TowerRun,
    compile_runs,
    document_path,
    list_runs,
    table,
)

pytest.importorskip("triton", reason="compiling needs Triton, which ships for Linux only")

# Rotary and pooled towers, float and uint8 pixels, few rows (split K) and many.
SAMPLE = [
    TowerRun("qwen2_vl", (256,)),
    TowerRun("qwen2_vl", (4096,), "uint8"),
    TowerRun("siglip", (1024,)),
]


@pytest.fixture(scope="module")
def sm_90() -> list[KernelReport]:
    return compile_runs(SAMPLE, "sm_90")


def problems(reports: list[KernelReport]) -> dict[str, list[str]]:
    return {f"{report.kernel} {report.config}": report.problems for report in reports if report.problems}


def test_towers_launch_kernels_without_spills(sm_90):
    assert problems(sm_90) == {}
    assert {report.kernel for report in sm_90 if report.compiled and report.compiled.spills} == set(KNOWN_SPILLS)


def test_reports_cover_the_kernels_of_a_block(sm_90):
    names = {report.kernel.removeprefix("_").removesuffix("_kernel") for report in sm_90}
    assert names >= {
        "patch_projection", "norm", "qkv_projection", "attention_fixed", "linear", "partial", "reduce", "rotary_table",
        "attention_pooling",
    }  # fmt: skip
    assert {model for report in sm_90 for model in report.models} == {"qwen2_vl", "siglip"}


def test_attention_takes_few_instructions_per_score(sm_90):
    found = {
        report.models[0]: report.instructions_per_element
        for report in sm_90
        if report.kernel == "_attention_fixed_kernel"
    }
    assert found["siglip"] <= 4.0
    assert found["qwen2_vl"] <= 5.9


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_90"])
def test_every_architecture_compiles_without_spills(architecture):
    assert problems(compile_runs(SAMPLE, architecture)) == {}


@pytest.mark.slow
def test_every_model_compiles_without_spills():
    runs = [run for run in list_runs() if run.images in ((1024,), static.MIXED)]
    assert problems(compile_runs(runs, "sm_90", workers=2)) == {}


def test_the_kept_report_covers_every_architecture():
    text = document_path().read_text(encoding="utf-8")
    assert set(re.findall(r"^\| (\w+)", text, re.MULTILINE)) == {"architecture", *ARCHITECTURES}
    assert "does not compile" not in text


def test_a_failing_run_only_fails_itself():
    reports = compile_runs([TowerRun("siglip", (1024,), "complex64"), TowerRun("siglip", (1,))], "sm_80")
    assert [report.error for report in reports if report.error]
    assert [report for report in reports if report.compiled]
    (failed,) = [report for report in reports if report.error]
    assert failed.problems[0].startswith("does not compile: ")
    assert failed.error in table([failed])


def test_a_spilling_kernel_is_a_problem(sm_90):
    linear = next(report for report in sm_90 if report.kernel == "_linear_kernel")
    assert linear.problems == []
    spilling = replace(linear, compiled=replace(linear.compiled, spills=3, tensor_core={}))
    assert spilling.problems == [
        "spills registers (3 instructions, 0 bytes of stack)", "has no HGMMA instruction"
    ]  # fmt: skip


def test_unknown_names_are_rejected():
    assert compile_runs([], "sm_80") == []
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*, got 'sm_70'"):
        compile_runs([], "sm_70")


@pytest.mark.parametrize(
    "arguments", [["--model", "nonsense"], ["--architecture", "sm_70"], ["--write", "--model", "siglip"]]
)
def test_the_command_line_rejects_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as refusal:
        static.main(arguments)
    assert refusal.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_as_a_command():
    done = run_python("-m", "tritontower.tuning.static", "--architecture", "sm_80", "--model", "clip", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert {report["models"][0] for report in json.loads(done.stdout)} == {"clip"}
