"""The campaign: every stage's code runs on a CPU, survives what may happen to it, and the README says what came of it."""

import contextlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import campaign, report, runner
from bench.cpu_stages import CPU_STAGES
from bench.runner import Setting, Stage, collect, is_complete, run_items, run_stage
from bench.stages import GPU_STAGES
from tritontower.benchmarks.documents import write_json
from tritontower.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(device=torch.device("cpu"), folder=tmp_path / "results", dry=True, seconds=500)


def stage_of(*items) -> Stage:
    return Stage("sample", "of the test", lambda setting: iter(items))


def results(stage: Stage, setting: Setting) -> dict:
    return json.loads((setting.folder / f"{stage.name}.json").read_text())


# -- the stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "stage"),
    [(kind, stage) for kind, stages in (("gpu", GPU_STAGES), ("cpu", CPU_STAGES)) for stage in stages],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_stage_runs_dry(stages, stage, setting):
    """All that a stage does on a GPU, with tiny shapes; the interpreter launches the kernels where there are any."""
    backend = contextlib.nullcontext()
    if stage.interpreted:
        backend = dispatch.use("triton" if torch.cuda.is_available() else "interpreter")
    with backend:
        run_items(stage, setting, {"campaign": stages})
    found = collect(stage, setting.folder)
    assert found["complete"] is True
    assert found["rows"]
    assert [row for row in found["rows"] if row["status"] != "ok"] == []


def test_a_stage_is_a_process_of_its_own(tmp_path, capsys):
    words = ["--dry-run", "--stage", "dot16", "--output", str(tmp_path), "--threads", "1"]
    assert campaign.main(words) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "dot16.json").read_text())
    assert found["dry_run"] is True
    assert found["campaign"] == "gpu"
    assert found["command"] == "python -m bench.campaign --stage dot16 --dry-run"
    assert "dot16: 2 results, 0 of them failed; complete" in capsys.readouterr().out
    assert "16 of the head, 4 warps" in (tmp_path / "logs" / "dot16.log").read_text()


@needs_no_gpu
def test_without_a_gpu_one_line_and_exit_code_2(capsys):
    assert campaign.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "needs a GPU" in printed.err
    assert printed.err.count("\n") == 1


def test_stages_are_listed_in_the_order_of_their_value(capsys):
    assert campaign.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:4] == ["tests", "peak", "attention", "dot16"]
    assert names == [stage.name for stage in GPU_STAGES]


def test_an_unknown_stage_is_refused(capsys):
    assert campaign.main(["--stage", "gems"]) == 2
    assert "no stage 'gems'; there are tests, peak" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", "0"), "have to be above zero"),
        (("--threads", "-1"), "have to be above zero"),
        (("--output", "{file}/results"), "cannot go to {file}/results (Not a directory); name another folder"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert campaign.main(["--dry-run", *(word.format(file=file) for word in words)]) == 2
    printed = capsys.readouterr()
    assert message.format(file=file) in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


# -- the frame --------------------------------------------------------------------------------------------------------


def test_items_are_kept_as_they_come_and_failures_are_results(setting):
    def fails():
        raise ValueError("of its own\naccord")

    stage = stage_of(("good", lambda: {"status": "ok", "value": 1}), ("bad", fails))
    run_items(stage, setting, {"campaign": "test"})
    collect(stage, setting.folder)
    found = results(stage, setting)
    assert [(row["key"], row["status"]) for row in found["rows"]] == [("good", "ok"), ("bad", "failed")]
    assert found["rows"][1]["reason"] == "ValueError: of its own accord"
    assert found["complete"]
    assert found["campaign"] == "test"
    assert found["torch"]
    assert is_complete(stage, setting.folder)
    assert not (setting.folder / "sample.jsonl").exists()


def test_a_stopped_stage_goes_on_where_it_was(setting):
    calls = []

    def once(name):
        calls.append(name)
        return {"status": "ok"}

    def stops():
        calls.append("stops")
        raise KeyboardInterrupt

    items = [("first", lambda: once("first")), ("second", stops), ("third", lambda: once("third"))]
    stage = stage_of(*items)
    for attempt in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_items(stage, setting, {})
        found = collect(stage, setting.folder)
        assert not found["complete"]
        assert [row["status"] for row in found["rows"]] == ["ok", "died"], attempt
    run_items(stage, setting, {})
    found = collect(stage, setting.folder)
    assert calls == ["first", "stops", "stops", "third"]
    assert {row["key"]: row["status"] for row in found["rows"]} == {"first": "ok", "second": "died", "third": "ok"}
    assert found["complete"]


def test_nothing_is_begun_when_time_is_up(setting):
    stage = stage_of(("late", lambda: pytest.fail("was begun")))
    run_items(stage, Setting(setting.device, setting.folder, dry=True, seconds=-1), {})
    found = collect(stage, setting.folder)
    assert not found["complete"]
    assert found["rows"] == []


def test_a_torn_line_is_not_read(setting):
    stage = stage_of(("one", lambda: {"status": "ok"}))
    run_items(stage, setting, {})
    path = setting.folder / "sample.jsonl"
    path.write_text(path.read_text() + '{"key": "two", "row": {"stat')
    assert [row["key"] for row in collect(stage, setting.folder)["rows"]] == ["one"]


CHILD = """
import json, os, sys, time
folder, what = sys.argv[1:3]
path = os.path.join(folder, "sample.jsonl")
done = open(path).read().count('"row"') if os.path.exists(path) else 0
with open(path, "a") as file:
    file.write(json.dumps({"facts": {"bench": "sample"}}) + "\\n")
    file.write(json.dumps({"key": str(done), "row": {"status": "ok"}}) + "\\n")
    if done == 2:
        file.write(json.dumps({"finished": True}) + "\\n")
if what == "hangs":
    time.sleep(60)
if what == "dies" and done < 2:
    os.abort()
"""


@pytest.mark.parametrize(("what", "rows", "complete"), [("dies", 3, True), ("hangs", 1, False)])
def test_a_process_that_dies_is_started_again_and_one_that_hangs_is_ended(setting, tmp_path, what, rows, complete):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    limit = Setting(setting.device, setting.folder, dry=True, seconds=30 if what == "dies" else 3)
    setting.folder.mkdir()
    found = run_stage(stage_of(), limit, [str(script), str(setting.folder), what])
    assert len(found["rows"]) == rows
    assert found["complete"] is complete


def test_a_process_that_never_gets_anywhere_is_not_started_again_and_again(setting, tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import sys, pathlib; open(sys.argv[1], 'a').write('x'); sys.exit(1)")
    assert run_stage(stage_of(), setting, [str(script), str(tmp_path / "starts")]) is None
    assert (tmp_path / "starts").read_text() == "x"


def test_complete_stages_are_left_alone_unless_asked(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(campaign, "run_stage", lambda stage, *_: calls.append(stage.name))
    write_json(tmp_path / "peak.json", {"complete": True, "rows": []})
    words = ["--dry-run", "--stage", "peak", "--output", str(tmp_path)]
    assert campaign.main(words) == 0
    assert calls == []
    archive = tmp_path / "all.tar.gz"
    assert campaign.main([*words, "--again", "--archive", str(archive)]) == 1
    assert calls == ["peak"]
    with tarfile.open(archive) as packed:
        assert packed.getnames() == [tmp_path.name]


# -- what is committed ------------------------------------------------------------------------------------------------


def strings(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from (text for pair in content.items() for part in pair for text in strings(part))
    elif isinstance(content, list):
        yield from (text for part in content for text in strings(part))


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*/*/*.json")), ids=lambda path: path.name)
def test_results_hold_no_path_of_one_machine(path):
    texts = list(strings(json.loads(path.read_text(encoding="utf-8"))))
    assert any(text.startswith("python ") for text in texts)
    assert [text for text in texts if re.search(r"(^|[\s='\"])(/|~|[A-Z]:\\)\w", text)] == []


# -- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_says_what_the_results_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.rewritten(readme, report.generated()) == readme, "run `python -m bench.report`"


def tower_row(family: str, pack: str, patches: int, **seconds: float) -> dict:
    return {
        "status": "ok",
        "key": f"{family}: {pack}",
        "family": family,
        "pack": pack,
        "pictures": 1,
        "patches": patches,
        "tokens": patches // 4,
        "flops": 8e12,
        "notes": {},
        "ratio": 2.0,
        "seconds": {name.replace("_", " "): [value] for name, value in seconds.items()},
    }


def keep(folder: Path, bench: str, rows: list[dict], **facts) -> None:
    document = {
        "bench": bench,
        "campaign": "gpu",
        "complete": True,
        "dry_run": False,
        "date": "2030-01-02T03:04:05",
        "summary": "made up",
        "gpu": "Chip",
        "torch": "2",
        "triton": "3",
        "transformers": "5",
        "rows": rows,
        **facts,
    }
    write_json(folder / f"{bench}.json", document)


def test_a_campaign_on_a_gpu_becomes_tables(tmp_path):
    folder = tmp_path / "chip" / "2030-01-02"
    assert report.generated(tmp_path)["gpu"] == report.NOT_RUN
    keep(folder, "peak", [{"key": "product of 8192³, bfloat16", "status": "ok", "tflops": 800.0}])
    times = {"tritontower": 0.0125, "tritontower_eager": 0.014, "transformers_sdpa": 0.05}
    compiled = {"tritontower": 0.0126, "transformers_sdpa, torch.compile".replace(" ", "_"): 0.03}
    keep(
        folder,
        "towers",
        [tower_row("Qwen2-VL", "4096 patches", 4096, **times), tower_row("Qwen2-VL", "4096 patches", 4096, **compiled)],
    )
    case = {"status": "ok", "kernel": "attention", "case": "heads 16 × 80", "flops": 4e9}
    keep(
        folder,
        "attention",
        [
            {**case, "tflops": 400.0, "seconds": {"tritontower": 1e-5, "torch sdpa": 2e-5}},
            {**case, "case": "heads 16 × 80, fixed", "config": "…", "tflops": 500.0, "seconds": {"tritontower": 8e-6}},
            {**case, "case": "heads 16 × 80, broken", "status": "failed"},
        ],
    )
    keep(folder, "stress", [{"status": "ok", "launches": 10_000, "wrong_draws": 0}])
    text = report.generated(tmp_path)["gpu"]
    assert "| Qwen2-VL | one square | 4,096 | 12.5 | 14 | 50 | 30 | 2.40 | 80 |" in text
    assert "| heads 16 × 80 | 400 | 200 | 500 | fixed |" in text
    assert "10,000 attention launches" in text
    assert report.NOT_RUN not in text


def test_later_results_count_and_unfinished_ones_do_not(tmp_path):
    row = {"key": "product of 8192³, bfloat16", "status": "ok"}
    keep(tmp_path / "chip" / "1", "peak", [{**row, "tflops": 1.0}], date="2030-01-01")
    keep(tmp_path / "chip" / "2", "peak", [{**row, "tflops": 2.0}], date="2030-01-02")
    keep(tmp_path / "chip" / "3", "peak", [{**row, "tflops": 3.0}], date="2030-01-03", complete=False)
    assert report.latest(tmp_path, "gpu")["peak"][1]["rows"][0]["tflops"] == 2.0


def test_a_dry_run_is_refused(tmp_path):
    keep(tmp_path / "chip" / "1", "peak", [], dry_run=True)
    with pytest.raises(ValueError, match="is of a dry run, which measures nothing"):
        report.generated(tmp_path)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="<!-- bench:cpu --> and <!-- /bench:cpu --> once each"):
        report.rewritten("no markers", {"cpu": "text"})


def test_the_makefile_runs_the_campaign():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-m bench.campaign $(GPU_FLAGS)" in makefile
    assert runner.ROOT == ROOT
