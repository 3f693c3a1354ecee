"""The campaign: every stage's code runs on a CPU, survives what may happen to it, and the README says what came of it."""

import contextlib
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import campaign, report, runner, stages, stress, tower_stages
from bench.cpu_stages import CPU_STAGES
from bench.runner import (
    CONDITIONS,
    OtherConditionsError,
    Setting,
    Stage,
    collect,
    facts_of,
    is_complete,
    run_items,
    run_stage,
)
from bench.stages import GPU_STAGES
from tritontower.benchmarks import documents, measuring
from tritontower.benchmarks.cases import Outcome
from tritontower.benchmarks.documents import document, list_tuned_tables, write_json
from tritontower.engine import tuned_tables as tables
from tritontower.kernels.runtime import dispatch

ROOT = Path(__file__).resolve().parents[2]
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
    ("kind", "stage"),
    [(kind, stage) for kind, several in (("gpu", GPU_STAGES), ("cpu", CPU_STAGES)) for stage in several],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_stage_runs_dry(kind, stage, setting):
    """All that a stage does on a GPU, with tiny shapes; the interpreter launches the kernels where there are any."""
    backend = contextlib.nullcontext()
    if stage.interpreted:
        backend = dispatch.use("triton" if torch.cuda.is_available() else "interpreter")
    with backend:
        run_items(stage, setting, {"campaign": kind})
    found = collect(stage, setting.folder)
    assert found["complete"] is True
    assert found["rows"]
    assert [row for row in found["rows"] if row["status"] != "ok"] == []


TEST_FILES = {
    "passed": ("def test_one(): pass", "ok"),
    "failed": ("def test_one(): assert False", "failed"),
    "skipped": ("import pytest\n@pytest.mark.skip\ndef test_one(): pass", "skipped"),
    "deselected": ("import pytest\n@pytest.mark.slow\ndef test_one(): pass", "skipped"),
}


@pytest.mark.parametrize(("text", "status"), TEST_FILES.values(), ids=TEST_FILES)
def test_a_file_of_which_no_test_ran_did_not_pass(text, status, tmp_path, setting):
    path = tmp_path / "test_sample.py"
    path.write_text(text)
    row = stages._run_tests(path, "not slow", setting)
    assert row["status"] == status
    assert ("reason" in row) is (status == "skipped")


def test_every_variant_gets_its_ten_thousand_launches(setting, monkeypatch):
    """Whatever heads a variant does not take are left to its others."""

    def refuses(case, device):
        return "of the test" if case.config.variant == "specialized" and case.sizes["head_dim"] == 72 else None

    monkeypatch.setattr(stress, "falls_back", refuses)
    made = dict(stress.stress_items(Setting(setting.device, setting.folder)))
    assert made["specialized, heads of 72"]() == {
        "status": "skipped",
        "variant": "specialized",
        "reason": "of the test",
    }
    launches = Counter()
    monkeypatch.setattr(stress, "_stress", lambda *_: pytest.fail("ran"))
    for make in made.values():
        if len(make.args) > 2:
            _, variant, _, _, _, wanted = make.args
            launches[variant] += wanted
    assert set(launches) == set(stress.VARIANTS)
    assert all(10_000 <= count < 10_100 for count in launches.values())
    assert sum(name.startswith("specialized, heads of 72") for name in made) == 2


def test_wrong_draws_of_a_series_are_all_counted(setting, monkeypatch):
    monkeypatch.setattr(stress, "check", lambda *_, **__: Outcome(distance=1.0, limit=0.5))
    with dispatch.use("triton" if torch.cuda.is_available() else "interpreter"):
        row = stress._stress(setting, "online", 64, 64, 0, 2 * stress.LAUNCHES_A_DRAW)
    assert (row["status"], row["launches"], row["wrong_draws"]) == ("failed", 8, 2)
    assert row["worst"] == 1.0


@pytest.mark.parametrize(
    ("first_run", "least", "expected"), [(0.4, 3, 7), (1.4, 3, 7), (2.0, 3, 3), (0.1, 9, 9), (60.0, 15, 15)]
)
def test_short_passes_run_seven_times(monkeypatch, first_run, least, expected):
    clock = iter((5.0, 5.0 + first_run))
    monkeypatch.setattr(tower_stages, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    tower = SimpleNamespace(device=torch.device("cpu"), forward=lambda batch: batch)
    assert tower_stages._repeats(tower, torch.zeros(1), least) == expected


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
    assert is_complete(stage, setting.folder, facts_of(stage, setting, {"campaign": "test"}))
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


def test_a_torn_line_takes_no_other_with_it(setting):
    stage = stage_of(("one", lambda: {"status": "ok"}))
    setting.folder.mkdir()
    (setting.folder / "sample.jsonl").write_text('{"facts": {"benc')
    run_items(stage, setting, {})
    assert [row["key"] for row in collect(stage, setting.folder)["rows"]] == ["one"]


@pytest.mark.parametrize("name", CONDITIONS)
def test_results_of_other_conditions_are_neither_done_nor_gone_on_with(setting, name):
    stage = stage_of(("one", lambda: {"status": "ok"}))
    current = facts_of(stage, setting, {})
    run_items(stage, setting, {})
    other = {**current, name: "another"}
    message = rf"sample: the results in .* were measured with {name} {re.escape(str(current.get(name)))}, and now it is another; --again"
    with pytest.raises(OtherConditionsError, match=message):
        is_complete(stage, setting.folder, other)  # from the lines
    collect(stage, setting.folder)
    assert is_complete(stage, setting.folder, current)
    with pytest.raises(OtherConditionsError, match=message):
        is_complete(stage, setting.folder, other)  # from the document


def test_a_real_run_does_not_go_on_with_dry_rows(setting):
    stage = stage_of(("one", lambda: {"status": "ok"}))
    run_items(stage, setting, {"campaign": "cpu"})
    real = Setting(setting.device, setting.folder, dry=False, seconds=500)
    with pytest.raises(OtherConditionsError, match="measured with dry_run True, and now it is False"):
        run_items(stage, real, {"campaign": "cpu"})
    with pytest.raises(OtherConditionsError, match="measured with campaign cpu, and now it is gpu"):
        run_items(stage, setting, {"campaign": "gpu"})


def test_rows_of_other_tuned_tables_name_them(setting):
    """The stage that tunes changes them under those that were begun before it."""

    def stops():
        raise KeyboardInterrupt

    before, after = {"shipped:sm_90.json": "1"}, {"user:NVIDIA_H200.json": "2", "shipped:sm_90.json": "1"}
    with pytest.raises(KeyboardInterrupt):
        run_items(stage_of(("one", lambda: {"status": "ok"}), ("two", stops)), setting, {"tuned": before})
    stage = stage_of(("one", lambda: pytest.fail("again")), ("two", lambda: {"status": "ok"}))
    run_items(stage, setting, {"tuned": after})
    found = collect(stage, setting.folder)
    assert found["tuned"] == after
    assert [row.get("tuned") for row in found["rows"]] == [before, None]


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
    facts = document("peak", [], device=torch.device("cpu"), dry_run=True, campaign="gpu", complete=True)
    write_json(tmp_path / "peak.json", facts)
    words = ["--dry-run", "--stage", "peak", "--output", str(tmp_path)]
    assert campaign.main(words) == 0
    assert calls == []
    archive = tmp_path / "all.tar.gz"
    assert campaign.main([*words, "--again", "--archive", str(archive)]) == 1
    assert calls == ["peak"]
    with tarfile.open(archive) as packed:
        assert packed.getnames() == [tmp_path.name]


def test_a_campaign_leaves_the_results_of_another_alone(monkeypatch, tmp_path, capsys):
    """Stages of the CPU and of a GPU share names; nothing is measured before all of them are looked at."""
    monkeypatch.setattr(campaign, "run_stage", lambda *_: pytest.fail("ran"))
    facts = document("families", [], device=torch.device("cpu"), dry_run=True, campaign="gpu", complete=True)
    write_json(tmp_path / "families.json", facts)
    assert campaign.main(["--cpu", "--dry-run", "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "families: the results in" in printed.err
    assert "were measured with campaign gpu, and now it is cpu; --again starts the stage over" in printed.err


# -- where results come from -------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_results_and_ignored_files_do_not_make_a_commit_dirty(monkeypatch, tmp_path):
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    monkeypatch.setattr(measuring, "__file__", str(tmp_path / "tritontower" / "benchmarks" / "measuring.py"))
    git("init")
    write("tritontower/benchmarks/measuring.py", "one")
    write("bench/results/old.json", "one")
    write(".gitignore", "*.log")
    git("add", ".")
    git("commit", "-m", "first")
    commit = measuring._commit()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    write("bench/results/old.json", "two")
    write("bench/results/machine/day/new.json", "one")
    write("some.log", "one")
    assert measuring._commit() == commit
    write("bench/results.py", "one")
    assert measuring._commit() == f"{commit}+"
    (tmp_path / "bench" / "results.py").unlink()
    write("tritontower/benchmarks/measuring.py", "two")
    assert measuring._commit() == f"{commit}+"


def test_a_document_of_a_gpu_names_the_tuned_tables_in_force(monkeypatch, tmp_path):
    chosen, user = tmp_path / "chosen", tmp_path / "tuned"
    monkeypatch.setenv(tables.FOLDER_VARIABLE, str(chosen))
    monkeypatch.setenv("TRITONTOWER_CACHE", str(tmp_path))
    for folder, text in ((chosen, "a"), (user, "b")):
        folder.mkdir()
        (folder / "Some_GPU.json").write_text(text)
    who = tables.Identity("Some GPU", "sm_90", "9.0", 132)
    found = list_tuned_tables("Some GPU")
    assert list(found) == ["chosen:Some_GPU.json", "user:Some_GPU.json"]
    assert found["chosen:Some_GPU.json"] == "ca978112ca1b"  # SHA-256 of the letter a
    assert str(tmp_path) not in json.dumps(found)
    monkeypatch.setattr(documents, "provenance", lambda device: {})
    monkeypatch.setattr(tables, "identify", lambda device: who)
    assert document("any", [], device=torch.device("cuda"))["tuned"] == found
    assert "tuned" not in document("any", [], device=torch.device("cpu"))


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
        "images": 1,
        "patches": patches,
        "tokens": patches // 4,
        "flops": 8e12,
        "notes": {},
        "ratio": 2.0,
        "seconds": {name.replace("_", " "): [0.99 * value, value, 1.04 * value] for name, value in seconds.items()},
    }


def keep(folder: Path, bench: str, rows: list[dict], **facts) -> None:
    document = {
        "bench": bench,
        "campaign": "gpu",
        "complete": True,
        "dry_run": False,
        "date": "2030-01-02T03:04:05",
        "summary": "made up",
        "commit": "abc",
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
    times = {"tritontower": 0.0125, "tritontower_eager": 0.014, "transformers_sdpa": 0.05, "products_alone": 0.01}
    compiled = {**times, "tritontower": 0.02, "transformers_sdpa, torch.compile".replace(" ", "_"): 0.03}
    keep(
        folder,
        "towers",
        [
            tower_row("Qwen2-VL", "4096 patches", 4096, **times),
            tower_row("Qwen2-VL", "256 patches", 256, **times),
            tower_row("Qwen2-VL", "4096 patches", 4096, **compiled),
        ],
    )
    case = {"status": "ok", "kernel": "attention", "case": "heads 16 × 80", "flops": 4e9}
    keep(
        folder,
        "attention",
        [
            {**case, "tflops": 400.0, "seconds": {"tritontower": 1e-5, "torch sdpa": 2e-5}, "rivals": ["torch sdpa"]},
            {**case, "case": "heads 16 × 80, fixed", "config": "…", "tflops": 500.0, "seconds": {"tritontower": 8e-6}},
            {**case, "case": "heads 16 × 80, broken", "status": "failed"},
        ],
    )
    product = {"status": "ok", "kernel": "linear", "case": "QKV", "flops": 4e9, "tflops": 400.0}
    keep(
        folder,
        "gemm",
        [
            {
                **product,
                "seconds": {"tritontower": 1e-5, "torch": 8e-6, "the product alone": 7e-6, "ours, apart": 6e-6},
                "rivals": ["torch"],
            },
            {
                **product,
                "case": "with rivals that failed",
                "seconds": {"tritontower": 1e-5, "the product alone": 7e-6},
                "rivals": [],
            },
        ],
    )
    series = {"status": "ok", "variant": "fixed", "launches": 5_000, "wrong_draws": 1}
    keep(folder, "stress", [series, {**series, "wrong_draws": 0}, {"status": "skipped"}, {"status": "died"}])
    text = report.generated(tmp_path)["gpu"]
    # A line is of one run: the ratio is not of a compiled tower to another run's time.
    assert "| Qwen2-VL | one square | 4,096 | 20 ± 4 % | 14 | 50 ± 4 % | 30 ± 4 % | 10 | 1.50 | 50 |" in text
    assert "| Qwen2-VL | one square | 256 | 12.5 ± 4 % | 14 | 50 ± 4 % | – | 10 | 4.00 | 80 |" in text
    assert "| heads 16 × 80 | 400 | 200 | 500 | fixed |" in text
    assert "the best variant tried (1 of 3 cases failed):" in text
    assert "| linear: QKV | 400 | 500 | 0.80 |" in text
    assert "| linear: with rivals that failed | 400 | – | – |" in text
    assert "random lengths: fixed 10,000. Draws with a wrong result: 1; series that an error ended: 1." in text
    assert "commit `abc`, on 2030-01-02" in text
    assert report.NOT_RUN not in text


def test_machines_have_sections_of_their_own(tmp_path):
    """No figure of one is set against a peak of another, nor against one of another day."""
    peak = [{"key": "product of 8192³, bfloat16", "status": "ok", "tflops": 800.0}]
    row = tower_row("Qwen2-VL", "4096 patches", 4096, tritontower=0.0125)
    keep(tmp_path / "a" / "1", "peak", peak, gpu="A")
    keep(tmp_path / "b" / "1", "towers", [row], gpu="B")
    keep(tmp_path / "c" / "1", "peak", peak, gpu="C", date="2030-01-01")
    keep(tmp_path / "c" / "2", "towers", [row], gpu="C")
    keep(tmp_path / "d" / "1", "peak", peak, gpu="D")
    keep(tmp_path / "d" / "1", "towers", [row], gpu="D")
    text = report.generated(tmp_path)["gpu"]
    parts = re.split("^#### (.)$", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    shares = {name: re.findall(r" (\S+) \|$", part, re.MULTILINE)[2:] for name, part in sections.items()}
    assert shares == {"A": [], "B": ["–"], "C": ["–"], "D": ["80"]}
    assert all(f"Measured on {name} (" in part for name, part in sections.items())


def test_failed_rows_of_a_cpu_stand_in_its_tables(tmp_path):
    facts = {"campaign": "cpu", "gpu": None, "cpu": "Chip", "threads": 2}
    ways = ("tritontower", "tritontower, with digests", "transformers")
    good = {"status": "ok", "key": "A", "label": "A", "seconds": {way: [0.002, 0.002, 0.0022] for way in ways}}
    good["in_turn"] = {way: [0.001 * number] for number, way in enumerate(ways, 1)}
    bad = {"status": "failed", "reason": "of the test"}
    folder = tmp_path / "chip" / "1"
    keep(folder, "preprocessing", [good, {**bad, "key": "B", "label": "C"}, {**bad, "key": "D"}], **facts)
    keep(folder, "memory", [{**bad, "key": "1024 patches"}], **facts)
    keep(folder, "loading", [{**bad, "key": "Qwen2-VL-2B"}], **facts)
    row = tower_row("CLIP", "448", 257, tritontower=0.5, transformers_sdpa=1.0, products_alone=0.4)
    keep(folder, "families", [row, {**bad, "key": "E"}], **facts)
    text = report.generated(tmp_path)["cpu"]
    assert "| A | 2 ± 3 % | 2 ± 3 % | – | 2 ± 3 % | 1.0 / 1.0 | 3.0 / 1.5 |" in text
    assert "| C | – | – | – | – | – | failed |" in text
    assert "| D | – | – | – | – | – | failed |" in text
    assert "failed at 1024 patches" in text
    assert "| Qwen2-VL-2B | failed | – | – | – |" in text
    assert "| CLIP | 448² | 257 | 64 | 500 ± 4 % | 1,000 ± 4 % | 400 ± 4 % | 2.00 |" in text
    assert "| E |  | – | – | – | – | – | failed |" in text
    assert "Measured on 2 threads of Chip" in text
    assert "Medians of 3 runs that take turns" in text


def test_what_no_commit_can_repeat_is_refused(tmp_path, monkeypatch, capsys):
    keep(tmp_path / "chip" / "1", "peak", [], commit="abc+")
    with pytest.raises(ValueError, match=r"peak.json was measured in a tree that differs from its commit \(abc\+\)"):
        report.generated(tmp_path)
    monkeypatch.setattr(report, "generated", lambda: report.latest(tmp_path, "gpu"))
    assert report.main(["--check"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "commit, then run `python -m bench.campaign --stage peak --again`" in printed.err
    # What a later result replaces does not count.
    keep(tmp_path / "chip" / "2", "peak", [], date="2030-01-03")
    assert report.latest(tmp_path, "gpu")["chip"]["peak"][1]["commit"] == "abc"


def test_later_results_count_and_unfinished_ones_do_not(tmp_path):
    row = {"key": "product of 8192³, bfloat16", "status": "ok"}
    keep(tmp_path / "chip" / "1", "peak", [{**row, "tflops": 1.0}], date="2030-01-01")
    keep(tmp_path / "chip" / "2", "peak", [{**row, "tflops": 2.0}], date="2030-01-02")
    keep(tmp_path / "chip" / "3", "peak", [{**row, "tflops": 3.0}], date="2030-01-03", complete=False)
    assert report.latest(tmp_path, "gpu")["chip"]["peak"][1]["rows"][0]["tflops"] == 2.0


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
