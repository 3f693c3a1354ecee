"""``tritontower tune``: what it prints, writes and returns; compilers and the GPU are stand-ins."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tritontower import cli
from tritontower.benchmarks import measuring
from tritontower.cli import tune
from tritontower.kernels.runtime import tables
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.models import qwen2_vl
from tritontower.tuning import tuner
from tritontower.tuning.compile.aot_compile import CompileResult, Launch, Order
from tritontower.tuning.tasks import Task

pytest.importorskip("triton", reason="tuning needs Triton, which ships for Linux only")

(PUBLISHED,) = qwen2_vl.SUMMARIES
GPU = tables.Identity("NVIDIA Test 1", "sm_90", "9.0", 132)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED.example))
    return folder


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> Iterator[Path]:
    """A cache and packaged tables of this test alone; compilers that answer at once, one tile in two spilling."""
    monkeypatch.setenv("TRITONTOWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(tables.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(tables, "packaged_folder", lambda: tmp_path / "packaged")

    def compiler(orders: Sequence[Order], **options: Any) -> Iterator[tuple[int, CompileResult]]:
        for index, order in enumerate(orders):
            fields = dict(order.config)
            warps = fields["num_warps"]
            spills = 9 if fields.get("block_columns") == 256 else 0
            facts = {"occupancy": 2, "tensor_core": {"HGMMA": 8}, "instructions": 600, "loop_instructions": 100}
            launch = Launch("_k", warps, 32 * warps, 128, spills, 0, 65536, **facts)
            yield index, CompileResult((launch,))

    monkeypatch.setattr(tuner, "compile_orders", compiler)
    tables.forget()
    yield tmp_path / "cache" / "tuned"
    tables.forget()


@pytest.fixture
def gpu(monkeypatch) -> dict[str, Any]:
    """A GPU on which everything takes 10 µs and is right, but for what the test says."""
    state: dict[str, Any] = {"wrong": lambda config: ""}

    class StandIn(tuner.Gauge):
        def error(self, task: Task, config: Mapping[str, Any]) -> tuple[float, str]:
            return 0.002, state["wrong"](config)

        def microseconds(self, task: Task, config: Mapping[str, Any]) -> float:
            return 10.0

    monkeypatch.setattr(tuner, "Gauge", StandIn)
    monkeypatch.setattr(tune, "_identity", lambda arguments: GPU)
    monkeypatch.setattr(measuring, "provenance", lambda device: {"ptxas": "12.8"})
    return state


def run(*words: object) -> int:
    return cli.main(["tune", *(str(word) for word in words)])


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


STATIC = ("--static", "--arch", "sm_90", "--patches", "1024")


class TestStatic:
    def test_writes_a_table_that_counts(self, model, folders, capsys):
        assert run(model, *STATIC, "--json") == 0
        found = report(capsys)
        path = folders / "sm_90.json"
        assert found["table"] == str(path)
        assert not found["measured"]
        assert found["missing"] == 0
        table = tables.read_table(path)
        assert len(table.entries) == len(found["tasks"]) == found["entries"]
        assert all(task["microseconds"] > 0 and 0 < task["share_of_peak"] < 1 for task in found["tasks"])
        (up,) = (task for task in found["tasks"] if task["task"].startswith("mlp.up:"))
        assert up["launches"] == 32
        entry = tables.find(
            "linear",
            tables.Identity("", "sm_90"),
            table.entries[0]["dtype"],
            {"columns": 5120, "inner": 1280, "activation": "quick_gelu", "residual": False},
            {"rows": 1024},
        )
        assert entry is not None
        assert entry[0]["config"] == up["config"]

    def test_text(self, model, capsys):
        assert run(model, *STATIC) == 0
        output = capsys.readouterr().out
        assert "mlp.up: linear, rows 1024, 1280 → 5120, activation quick_gelu" in output
        assert " predicted" in output
        assert "spills registers" in output

    def test_a_configuration_file(self, model, capsys):
        assert run("--config", model / "config.json", *STATIC, "--json") == 0
        first = report(capsys)
        assert run(model, *STATIC, "--json") == 0
        second = report(capsys)
        assert first["tasks"] == second["tasks"]

    def test_another_folder(self, model, folders, tmp_path, capsys):
        assert run(model, *STATIC, "--output", tmp_path / "new" / "folder") == 0
        assert (tmp_path / "new" / "folder" / "sm_90.json").is_file()
        assert not folders.exists()

    def test_no_time(self, model, folders, capsys):
        assert run(model, *STATIC, "--budget", "1e-9") == 1
        assert "nothing was done in the time given" in capsys.readouterr().out
        assert not (folders / "sm_90.json").exists()

    def test_dtype(self, model, folders):
        assert run(model, *STATIC, "--dtype", "float16") == 0
        assert {entry["dtype"] for entry in tables.read_table(folders / "sm_90.json").entries} == {"float16"}


class TestMeasured:
    def test_writes_times(self, model, gpu, folders, capsys):
        gpu["wrong"] = lambda config: "wrong by a lot" if config.get("vendor") else ""
        assert run(model, "--patches", "256,1024", "--json") == 0
        found = report(capsys)
        table = tables.read_table(folders / "NVIDIA_Test_1.json")
        assert table.key["ptxas"] == "12.8"
        assert {entry["microseconds"] for entry in table.entries} == {10}
        assert {entry["verified"] for entry in table.entries} == {0.002}
        assert any(each["reason"] == "wrong by a lot" for task in found["tasks"] for each in task["dropped"])
        assert not (folders / "NVIDIA_Test_1.journal").exists()

    def test_goes_on_where_it_was(self, model, gpu, folders, capsys):
        """The first run is stopped in the middle; the second takes no time twice and leaves no journal."""
        asked: list[Any] = []

        def stop(config: Mapping[str, Any]) -> str:
            asked.append(config)
            if len(asked) == 8:
                raise KeyboardInterrupt
            return ""

        gpu["wrong"] = stop
        assert run(model, "--patches", "1024") == 130
        assert "interrupted" in capsys.readouterr().err
        journal = folders / "NVIDIA_Test_1.journal"
        assert journal.read_text().count("dropped") == 7
        assert run(model, "--patches", "1024", "--json") == 0
        assert report(capsys)["missing"] == 0
        second = len(asked) - 8
        assert not journal.exists()
        assert run(model, "--patches", "1024") == 0
        assert len(asked) - 8 - second == second + 7

    def test_show_says_where_from(self, model, gpu, folders, capsys):
        assert run(model, "--patches", "1024", "--show") == 0
        before = capsys.readouterr().out
        assert "the default" in before
        assert "(not there)" in before
        assert run(model, "--patches", "1024") == 0
        capsys.readouterr()
        assert run(model, "--patches", "1024", "--show", "--json") == 0
        found = report(capsys)
        assert {task["table"] for task in found["tasks"]} == {str(folders / "NVIDIA_Test_1.json")}
        assert all(task["measured"] for task in found["tasks"])

    def test_show_marks_a_table_that_is_none(self, model, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv(tables.FOLDER_VARIABLE, str(tmp_path))
        (tmp_path / "sm_90.json").write_text("{")
        assert run(model, "--patches", "64", "--show", "--arch", "sm_90") == 0
        output = capsys.readouterr().out
        assert f"1  {tmp_path / 'sm_90.json'}  (ignored: no table of tuned configurations)" in output
        assert output.count("(not there)") == 2

    def test_export_and_import(self, model, gpu, folders, tmp_path, monkeypatch, capsys):
        assert run(model, "--patches", "1024") == 0
        assert run("--export", tmp_path / "shared.json") == 0
        capsys.readouterr()
        monkeypatch.setenv("TRITONTOWER_CACHE", str(tmp_path / "elsewhere"))
        tables.forget()
        assert run("--import", tmp_path / "shared.json", "--json") == 0
        imported = report(capsys)
        copy = tmp_path / "elsewhere" / "tuned" / "NVIDIA_Test_1.json"
        assert imported["table"] == str(copy)
        assert copy.read_text() == (folders / "NVIDIA_Test_1.json").read_text()
        assert imported["imported"] == imported["entries"] == len(tables.read_table(copy).entries)

    def test_an_import_says_what_it_left_out(self, model, gpu, folders, tmp_path, capsys):
        """Entries for another release of a kernel: they do not take the place of those that count."""
        assert run(model, "--patches", "1024") == 0
        path = folders / "NVIDIA_Test_1.json"
        before = path.read_text()
        stale = json.loads(before)
        for entry in stale["entries"]:
            entry["source"] = "0" * 12
        (tmp_path / "stale.json").write_text(json.dumps(stale))
        capsys.readouterr()
        assert run("--import", tmp_path / "stale.json") == 0
        count = len(stale["entries"])
        assert f"0 of {count} entries added: {path} holds {count}; what the table knew" in capsys.readouterr().out
        assert path.read_text() == before


class TestMistakes:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    @pytest.mark.parametrize("more", [(), ("--budget", "1")])
    def test_no_gpu(self, model, more, capsys):
        assert run(model, *more) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(
            "tritontower: error: there is no GPU here to measure on; `--static --arch sm_90`"
        )
        assert captured.err.count("\n") == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    @pytest.mark.parametrize("arguments", [("{model}", "--show"), ("--export", "{model}/table.json")])
    def test_tables_without_a_gpu_need_an_architecture(self, model, arguments, capsys):
        assert run(*(argument.format(model=model) for argument in arguments)) == 2
        captured = capsys.readouterr()
        assert f"no GPU here for {next(word for word in arguments if word.startswith('--'))}" in captured.err
        assert "name an architecture with --arch" in captured.err
        assert captured.err.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name one model, or --config FILE"),
            (["{model}", "--config", "{model}/config.json"], "name one model, or --config FILE"),
            (["{model}", "--static"], "name it with --arch"),
            (["{model}", "--arch", "sm_90"], "--arch has no say in measuring; it goes with --static, --show, --export"),
            (["{model}", "--static", "--show", "--arch", "sm_90"], "not allowed with argument"),
            (["--import", "{model}/config.json", "--export", "{folder}/x.json"], "not allowed with argument"),
            (["{model}", "--import", "{model}/config.json", "--show"], "not allowed with argument"),
            (["--import", "{model}/config.json", "--config", "{model}/config.json"], "--config has no say in --import"),
            (["--import", "{model}/config.json", "--arch", "sm_80"], "--arch has no say in --import"),
            (["{model}", "--import", "{model}/config.json"], "MODEL has no say in --import"),
            (["{model}", "--show", "--arch", "sm_90", "--budget", "3"], "--budget has no say in --show"),
            (["{model}", "--show", "--arch", "sm_90", "--output", "{folder}"], "--output has no say in --show"),
            (["{model}", "--export", "{folder}/x.json", "--arch", "sm_90"], "MODEL has no say in --export"),
            (["--export", "{folder}/x.json", "--dtype", "float16"], "--dtype has no say in --export"),
            (["{model}", "--static", "--arch", "sm_90", "--device", "cuda:1"], "--device has no say in --static"),
            (["{model}", "--show", "--arch", "sm_90", "--device", "cuda:1"], "name one of them"),
            (["--config", "{model}/config.json", "--revision", "x", "--static", "--arch", "sm_90"], "of a hub id"),
            (["{model}", "--static", "--arch", "sm_70"], "invalid choice"),
            (["{model}", "--patches", "0"], "'0' is not a positive whole number"),
            (["{model}", "--patches", "1,x"], "'x' is not a positive whole number"),
            (["{model}", "--patches", "9999999"], "the limit is 1048576"),
            (["{model}", "--budget", "0"], "not a number of minutes above zero"),
            (["{model}", "--budget", "soon"], "not a number of minutes above zero"),
            (["{model}", "--workers", "0"], "not a positive whole number"),
            (["{folder}/absent", "--static", "--arch", "sm_90"], "neither a local folder nor a hub id"),
            (["--config", "{folder}/absent.json", "--static", "--arch", "sm_90"], "there is no configuration file"),
            (["{model}", "--static", "--arch", "sm_90", "--output", "{model}/config.json"], "is a file; name a folder"),
            (
                ["{model}", "--static", "--arch", "sm_90", "--output", "{model}/config.json/tables"],
                "/config.json/tables' for the table cannot be made (Not a directory); name another with --output",
            ),
            (["--import", "{model}/config.json"], "is no table of tuned configurations: "),
            (["--import", "{folder}/absent.json"], "is no table of tuned configurations: No such file"),
            (["--export", "{folder}/x.json", "--arch", "sm_80"], "there is no table sm_80.json to export"),
        ],
    )
    def test_are_one_line(self, arguments, message, model, tmp_path, capsys):
        places = {"model": model, "folder": tmp_path}
        assert run(*(argument.format(**places) for argument in arguments)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""

    def test_architectures_are_those_of_the_kernels(self):
        assert tune._ARCHITECTURES == ARCHITECTURES

    def test_every_option_has_a_say_in_something(self):
        parser = argparse.ArgumentParser()
        tune.add_arguments(parser)
        known = {action.dest for action in parser._actions} - {"help", "json", "static", "show", "export", "imported"}
        assert known == {name for names in tune._TAKES.values() for name in names}

    def test_help(self, capsys):
        assert run("--help") == 0
        assert "--static" in capsys.readouterr().out
