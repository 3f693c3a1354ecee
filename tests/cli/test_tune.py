"""``tritontower tune``: output, tables and exit codes; compilers and the GPU are stand-ins."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tuning import GPU, QWEN2, StandInGauge, stand_in_compiler

from tritontower import cli
from tritontower.benchmarks import measuring
from tritontower.cli import tune
from tritontower.engine import tuned_tables
from tritontower.engine.tuned_tables import FOLDER_VARIABLE, folders, read_table
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.models.common.family import write_config
from tritontower.tuning import tuner

pytest.importorskip("triton", reason="tuning needs Triton, which ships for Linux only")

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def model(tmp_path) -> Path:
    return write_config(tmp_path / "model", QWEN2)


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Folder of the user's tables; compilers answer at once, and tiles with 256 columns spill."""
    monkeypatch.setenv("TRITONTOWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(folders, "kernels_folder", lambda: tmp_path / "kernels")
    compiler = stand_in_compiler(lambda values: values.get("block_columns") == 256)
    monkeypatch.setattr(tuner, "compile_orders", compiler)
    return tmp_path / "cache" / "tuned"


@pytest.fixture
def gpu(monkeypatch) -> dict[str, Any]:
    """A GPU on which every launch takes 10 µs; ``wrong`` says which results are wrong."""
    state: dict[str, Any] = {"wrong": lambda config: ""}
    monkeypatch.setattr(tuner, "Gauge", lambda device: StandInGauge(wrong=lambda config: state["wrong"](config)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(tuned_tables, "identify", lambda device: GPU)
    monkeypatch.setattr(measuring, "provenance", lambda device: {"ptxas": "12.8"})
    return state


def run(*words: object) -> int:
    return cli.main(["tune", *(str(word) for word in words)])


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


STATIC = ("--static", "--arch", "sm_90", "--patches", "1024")


class TestStatic:
    def test_the_report_lists_what_compiles(self, model, user_folder, capsys):
        assert run(model, *STATIC, "--json") == 0
        found = report(capsys)
        assert (found["architecture"], found["missing"]) == ("sm_90", 0)
        (up,) = (task for task in found["tasks"] if task["task"].startswith("mlp.up:"))
        assert up["launches"] == 32
        spilling = [each for each in up["candidates"] if each["problem"]]
        assert spilling
        assert all(each["config"]["block_columns"] == 256 for each in spilling)
        default = up["candidates"][0]
        assert (default["registers"], default["shared_memory"], default["occupancy"]) == (128, 65536, 2)
        assert (default["tensor_core"], default["loop_instructions"]) == ({"HGMMA": 8, "UTCHMMA": 8}, 100)
        assert not user_folder.exists()

        assert run("--config", model / "config.json", *STATIC, "--dtype", "float16") == 0
        output = capsys.readouterr().out
        assert "mlp.up: gemm.linear, rows 1024, 1280 → 5120, activation quick_gelu" in output
        assert "usable configurations" in output
        assert " spills registers (--json lists them)" in output

    def test_without_time_nothing_is_done(self, model, capsys):
        assert run(model, *STATIC, "--budget", "1e-9") == 1
        assert "nothing was done in the given time" in capsys.readouterr().out


class TestMeasuring:
    def test_times_become_a_table(self, model, gpu, user_folder, capsys):
        gpu["wrong"] = lambda config: "wrong by a lot" if config.get("vendor") else ""
        assert run(model, "--patches", "256,1024", "--json") == 0
        found = report(capsys)
        table = read_table(user_folder / "NVIDIA_Test_1.json")
        assert table.key["ptxas"] == "12.8"
        assert {(entry["microseconds"], entry["verified"]) for entry in table.entries} == {(10, 0.002)}
        assert len(table.entries) == len(found["tasks"]) == found["entries"] == found["added"]
        assert any(each["reason"] == "wrong by a lot" for task in found["tasks"] for each in task["dropped"])
        assert not (user_folder / "NVIDIA_Test_1.journal").exists()

    def test_an_interrupted_run_continues(self, model, gpu, tmp_path, capsys):
        """The second run repeats no measurement and removes the journal; the third measures anew."""
        asked: list[Any] = []

        def stop(config: Mapping[str, Any]) -> str:
            asked.append(config)
            if len(asked) == 8:
                raise KeyboardInterrupt
            return ""

        gpu["wrong"] = stop
        words = (model, "--patches", "1024", "--output", tmp_path / "new" / "folder")
        assert run(*words) == 130
        assert "interrupted" in capsys.readouterr().err
        journal = tmp_path / "new" / "folder" / "NVIDIA_Test_1.journal"
        assert journal.read_text().count("dropped") == 7
        assert run(*words, "--json") == 0
        assert report(capsys)["missing"] == 0
        second = len(asked) - 8
        assert not journal.exists()
        assert run(*words) == 0
        assert len(asked) - 8 - second == second + 7


class TestShow:
    def test_tables_of_a_gpu(self, model, gpu, user_folder, capsys):
        assert run(model, "--patches", "1024", "--show") == 0
        before = capsys.readouterr().out
        assert "default" in before
        assert before.count("(not there)") == 2
        assert run(model, "--patches", "1024") == 0
        output = capsys.readouterr().out
        assert "speedup over the default" in output
        assert run(model, "--patches", "1024", "--show", "--json") == 0
        found = report(capsys)
        assert {task["table"] for task in found["tasks"]} == {str(user_folder / "NVIDIA_Test_1.json")}
        assert all(task["tuned_for"] for task in found["tasks"])

    def test_a_broken_table_is_marked(self, model, gpu, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        (tmp_path / "NVIDIA_Test_1.json").write_text("{")
        assert run(model, "--patches", "64", "--show") == 0
        expected = f"1  {tmp_path / 'NVIDIA_Test_1.json'}  (ignored: no table of tuned configurations)"
        assert expected in capsys.readouterr().out

    def test_defaults_of_an_architecture(self, model, capsys):
        assert run(model, "--patches", "64", "--show", "--arch", "sm_80", "--json") == 0
        found = report(capsys)
        assert found["tables"] == []
        assert all(task["config"] and task["table"] is None for task in found["tasks"])


class TestExportAndImport:
    def test_a_table_travels(self, model, gpu, user_folder, tmp_path, monkeypatch, capsys):
        assert run("--export", tmp_path / "shared.json") == 2
        assert "there is no table of NVIDIA Test 1 to export; looked for " in capsys.readouterr().err
        assert run(model, "--patches", "1024") == 0
        assert run("--export", tmp_path / "shared.json") == 0
        capsys.readouterr()
        monkeypatch.setenv("TRITONTOWER_CACHE", str(tmp_path / "elsewhere"))
        assert run("--import", tmp_path / "shared.json", "--json") == 0
        imported = report(capsys)
        copy = tmp_path / "elsewhere" / "tuned" / "NVIDIA_Test_1.json"
        assert imported["table"] == str(copy)
        assert copy.read_text() == (user_folder / "NVIDIA_Test_1.json").read_text()
        assert imported["imported"] == imported["entries"] == len(read_table(copy).entries)


ARCH = ("--arch", "sm_90")


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param(
                ["{model}", "--budget", "1"],
                "needs a GPU, and there is none here; `--static --arch sm_90`",
                marks=NO_GPU,
            ),
            pytest.param(["{model}", "--show"], "; `--show --arch sm_90` shows the defaults", marks=NO_GPU),
            pytest.param(["--export", "{folder}/x.json"], "--export needs a GPU, and there is none", marks=NO_GPU),
            ([], "name one model, or --config FILE"),
            (["{model}", "--config", "{model}/config.json"], "name one model, or --config FILE"),
            (["{model}", "--static"], "name it with --arch"),
            (["{model}", *ARCH], "--arch has no effect on measuring; it goes with --static, --show"),
            (["{model}", "--static", "--show", *ARCH], "not allowed with argument"),
            (["--import", "{model}/config.json", "--config", "x"], "--config has no effect on --import"),
            (["{model}", "--import", "{model}/config.json"], "MODEL has no effect on --import"),
            (["{model}", "--show", *ARCH, "--budget", "3"], "--budget has no effect on --show"),
            (["{model}", "--static", *ARCH, "--output", "{folder}"], "--output has no effect on --static"),
            (["--export", "{folder}/x.json", *ARCH], "--arch has no effect on --export"),
            (["{model}", "--show", *ARCH, "--device", "cuda:1"], "name one of them"),
            (["--config", "{model}/config.json", "--revision", "x", "--static", *ARCH], "with a hub id"),
            (["{model}", "--static", "--arch", "sm_70"], "invalid choice"),
            (["{model}", "--patches", "1,x"], "'x'"),
            (["{model}", "--budget", "0"], "not a number of minutes above zero"),
            (["{model}", "--budget", "soon"], "not a number of minutes above zero"),
            (["{model}", "--workers", "0"], "'0'"),
            (["{folder}/absent", "--static", *ARCH], "must be a local folder, or a hub id"),
            (["--config", "{folder}/absent.json", "--static", *ARCH], "absent.json does not exist or is not a file"),
            (["--import", "{model}/config.json"], "is no table of tuned configurations: "),
            (["--import", "{folder}/absent.json"], "is no table of tuned configurations: No such file"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, model, tmp_path, capsys):
        places = {"model": model, "folder": tmp_path}
        assert run(*(argument.format(**places) for argument in arguments)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("config.json", "--output must be a folder that can be written, got "),
            ("config.json/x", "(Not a directory); name another"),
        ],
    )
    def test_the_folder_is_checked_before_the_work(self, output, message, model, gpu, capsys):
        assert run(model, "--output", model / output) == 2
        assert message in capsys.readouterr().err

    def test_choices_of_arch_are_those_of_the_kernels(self):
        parser = argparse.ArgumentParser()
        tune.add_arguments(parser)
        assert f"{{{','.join(ARCHITECTURES)}}}" in parser.format_help()
