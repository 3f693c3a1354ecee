"""Campaign and report: every step's command is valid, results are kept, and pages are generated from them."""

import json
import random
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import campaign, report, stress, variants
from bench.campaign import CPU_STEPS, GPU_STEPS, Step
from tritontower.benchmarks.cases import Outcome, cases
from tritontower.benchmarks.roofline import Roofline
from tritontower.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*/*/*.json"))


@pytest.fixture
def run_in_process(monkeypatch):
    """Runs a step as a Python file, in its own process."""

    def run(code: str, folder: Path, minutes: float = 1.0, name: str = "sample") -> bool:
        script = folder / "step_script.py"
        folder.mkdir(parents=True, exist_ok=True)
        script.write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        return campaign.run_step(Step(name, "of the test", "step_script {result}"), folder, minutes=minutes, threads=1)

    return run


@pytest.mark.parametrize(
    ("step", "threads"), [*((step, None) for step in GPU_STEPS), *((step, 2) for step in CPU_STEPS)]
)
def test_every_step_is_a_valid_command(step, threads, tmp_path, capsys):
    """Options are parsed by the command's own parser; a module is one that exists."""
    module, *words = step.arguments(tmp_path / "result.json", threads)
    assert ("--threads" in words) == (threads is not None)
    assert (
        module == "pytest" or step.name == "tune" or words[words.index("--output") + 1] == str(tmp_path / "result.json")
    )
    if module == "tritontower":
        assert build_parser(words[0]).parse_args(words[1:])
    elif module == "pytest":
        assert (ROOT / words[-1]).is_dir()
    else:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        known = {"variants": variants, "stress": stress}.get(module.removeprefix("bench."))
        if known is not None:
            with pytest.raises(SystemExit, match="0"):
                known.main(["--help"])
            options = {word for word in words if word.startswith("--")}
            assert options <= set(
                shlex.split(capsys.readouterr().out.replace("[", " ").replace("]", " ").replace("'", ""))
            )


def test_a_complete_step_is_skipped_and_a_partial_one_repeated(run_in_process, tmp_path, capsys):
    code = "import sys, json; json.dump({'complete': %s}, open(sys.argv[1], 'w')); print('ran')"
    assert run_in_process(code % "False", tmp_path)
    assert run_in_process(code % "True", tmp_path)
    assert run_in_process("raise SystemExit(1)", tmp_path)
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "logs" / "sample.log").read_text() == "ran\n"


def test_a_failing_or_slow_step_is_reported(run_in_process, tmp_path, capsys):
    assert not run_in_process("raise SystemExit(3)", tmp_path)
    assert "failed with exit code 3" in capsys.readouterr().out
    assert not run_in_process("import time; time.sleep(60)", tmp_path, minutes=0.02)
    assert "stopped after 0.02 minutes" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "message"), [([], "needs a GPU"), (["--cpu", "--step", "x"], "--step must be one of towers")]
)
def test_bad_usage_is_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        campaign.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kernel", ["attention", "linear"])
def test_variants_are_right_and_distinct(kernel, kernel_device):
    case = next(iter(cases("small", torch.bfloat16, [kernel])))
    if kernel == "attention":
        found = list(variants.attention_variants(replace(case, sizes={**case.sizes, "lengths": [64, 64]})))
        assert {each.config.variant for each in found} == {"online", "fixed", "single_block"}
        found = [each for each in found if each.config.variant in ("online", "single_block")][-2:]
        assert not any(variants.replaced_because(each, kernel_device) for each in found)
    else:
        found = list(variants.linear_variants(case, kernel_device))
        assert len({str(each.config) for each in found}) == len(found) > 4
        found = found[:2]
    rows = [
        variants.measure(each, kernel_device, Roofline(1e12, 1e11, "x"), baselines=False, budget_seconds=0.0)
        for each in found
    ]
    assert [row["status"] for row in rows] == ["ok", "ok"], rows


@pytest.mark.parametrize("variant", ["online", "fixed", "single_block"])
def test_stress_passes_in_the_interpreter(variant, kernel_device):
    row = stress.stress(variant, 64, 64, launches=1, device=kernel_device, tiny=True)
    assert (row["status"], row["launches"], row["wrong_draws"]) == ("ok", stress.REPEATS, 0)


def test_stress_counts_every_wrong_draw(monkeypatch, kernel_device):
    monkeypatch.setattr(stress, "check", lambda *_, **__: Outcome(distance=1.0, limit=0.5))
    row = stress.stress("online", 64, 64, launches=2 * stress.REPEATS, device=kernel_device, tiny=True)
    assert (row["status"], row["wrong_draws"], row["worst"]) == ("failed", 2, 1.0)


def test_draws_cover_short_and_long_segments():
    chance = random.Random(0)
    lengths = [length for _ in range(200) for length in stress.draw(chance, "online", 80, 80).sizes["lengths"]]
    assert (min(lengths), max(lengths) > 2000) == (0, True)


def write(folder: Path, step: str, **changes: object) -> None:
    """Writes the result of a step."""
    seconds = {"tritontower": [0.1, 0.2, 0.3], "transformers sdpa": [0.4, 0.4, 0.4], "matmul only": [0.05]}
    row = {"status": "ok", "family": "F", "batch": "1024 patches", "seconds": seconds, "ratio": 2.0}
    row |= {"blocks": 8, "images": 1, "patches": 1024, "tokens": 256}
    content = {"bench": "towers", "complete": True, "date": "2026-11-21T00:00:00", "commit": "abc", "rows": [row]}
    content |= {"torch": "2.13", "transformers": "5.23", "threads": 2, "cpu": "Some CPU", **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step}.json").write_text(json.dumps(content))


def test_report_rewrites_its_sections(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n")
    write(tmp_path / "m" / "1", "towers")
    write(tmp_path / "m" / "2", "towers", date="2026-11-22T00:00:00", commit="def")
    write(tmp_path / "m" / "3", "towers", date="2026-11-23T00:00:00", complete=False)
    options = {"pages": [page], "results": tmp_path}
    assert report.main(["--check"], **options) == 1
    assert report.main([], **options) == 0
    assert report.main(["--check"], **options) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "`def`" in text
    assert "| F | one square | 1,024 | 256 | 200 ± 50 % | 400 ± 0 % | 50 ± 0 % | 2.00 |" in text
    assert report.generate(tmp_path)["gpu"] == report.NO_GPU
    assert "200 ± 50 %" in report.generate(tmp_path)["summary"]


def test_report_refuses_uncommitted_results(tmp_path, capsys):
    write(tmp_path / "m" / "1", "towers", commit="abc+")
    assert report.main([], pages=[], results=tmp_path) == 2
    assert "must be measured in a clean checkout" in capsys.readouterr().err


def test_report_refuses_broken_markers():
    with pytest.raises(ValueError, match="once each"):
        report.rewrite("<!-- bench:cpu -->", {"cpu": "x"})


def test_pages_show_the_committed_results():
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_hold_no_path_of_a_machine(path):
    content = json.loads(path.read_text())
    assert content["complete"] is True
    assert not content["commit"].endswith("+")
    assert not [word for word in shlex.split(content["command"]) if Path(word).is_absolute()]
