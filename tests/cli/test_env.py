"""The command line's frame, its shared options, and the problems that ``tritontower env`` reports."""

import argparse
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import tritontower
from tritontower import cli
from tritontower.cli import env, options
from tritontower.errors import TowerError

ROOT = Path(__file__).resolve().parents[2]

GPU = env.Accelerator("cuda:0", "A fine GPU", 80 * 2**30, "sm_90", "triton")
GOOD = env.Environment(
    python="3.12.1",
    system="Linux 6 x86_64",
    packages={
        "torch": "2.13.0+cpu",
        "triton": "3.7.1",
        "transformers": "5.20.0",
        "huggingface-hub": "2.0.0",
        "safetensors": "0.8.1",
        "pillow": "13.0.0",
        "numpy": "2.4.0",
        "torchvision": None,
    },
    cpu_backend="reference",
    cpu_cores=2,
    cpu_threads=2,
    cpu_features=("avx2", "avx512_bf16"),
)


def _with(environment: env.Environment = GOOD, /, **packages: str | None) -> env.Environment:
    return replace(environment, packages={**environment.packages, **packages})


@pytest.fixture
def fake_command(monkeypatch):
    """Registers a command with the given ``run`` and one number as argument."""

    def register(run) -> None:
        command = types.ModuleType("tritontower.cli.fake", "Do nothing in particular.\n\nAt length.")
        command.EXAMPLE = "tritontower fake 3"
        command.add_arguments = lambda parser: parser.add_argument("number", type=options.positive_integer)
        command.run = run
        monkeypatch.setitem(sys.modules, "tritontower.cli.fake", command)
        monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, "fake"))

    return register


class TestFrame:
    @pytest.mark.parametrize("word", ["--help", "-h", "help"])
    def test_help_lists_every_command_on_one_line(self, word, capsys):
        assert cli.main([word]) == 0
        output = capsys.readouterr().out
        for name in cli.COMMANDS:
            assert [line for line in output.splitlines() if line.startswith(f"  {name} ") and len(line) < 130]

    def test_no_command_prints_the_help_and_exits_with_2(self, capsys):
        assert cli.main([]) == 2
        assert "commands:" in capsys.readouterr().err

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"tritontower {tritontower.__version__}\n"

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_every_command_has_help_with_an_example(self, name, capsys):
        assert cli.main([name, "--help"]) == 0
        output = capsys.readouterr().out
        assert output.startswith(f"usage: tritontower {name} ")
        assert f"example:\n  tritontower {name} " in output

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_every_example_is_valid(self, name, monkeypatch, tmp_path):
        command = import_module(f"tritontower.cli.{name}")
        monkeypatch.chdir(tmp_path)
        for image in ("cat.jpg", "chart.png", "holiday.jpg", "diagram.png"):
            (tmp_path / image).touch()
        words = command.EXAMPLE.split()
        assert words[:2] == ["tritontower", name]
        assert isinstance(cli.build_parser(name).parse_args(words[2:]), argparse.Namespace)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["inspekt"],
                "command must be one of demo, env, families, inspect, encode, parity, bench, tune, fake, got 'inspekt'; did you",
            ),
            (["qqq"], "command must be one of demo, env,"),
            (["fake"], "the following arguments are required: number; see `tritontower fake --help`"),
            (["fake", "x"], "argument number: must be a positive whole number, got 'x'; see"),
            (["fake", "1", "--frobnicate"], "unrecognized arguments: --frobnicate; see"),
        ],
    )
    def test_bad_usage_gets_one_line(self, words, message, fake_command, capsys):
        fake_command(lambda arguments: 0)
        assert cli.main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith(f"tritontower: error: {message}")

    @pytest.mark.parametrize("code", [0, 1])
    def test_exit_code_is_the_commands(self, code, fake_command):
        fake_command(lambda arguments: code)
        assert cli.main(["fake", "3"]) == code

    @pytest.mark.parametrize("error", [TowerError("many\n  lines\nof text"), OSError("many lines of text")])
    def test_errors_become_one_line(self, error, fake_command, capsys):
        def run(arguments):
            raise error

        fake_command(run)
        assert cli.main(["fake", "3"]) == 2
        assert capsys.readouterr().err == "tritontower: error: many lines of text\n"
        assert cli.main(["fake", "3", "--traceback"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1] == "tritontower: error: many lines of text"

    def test_a_bug_keeps_its_traceback(self, fake_command):
        fake_command(lambda arguments: {}["missing"])
        with pytest.raises(KeyError):
            cli.main(["fake", "3"])

    def test_interruption(self, fake_command, capsys):
        def run(arguments):
            raise KeyboardInterrupt

        fake_command(run)
        assert cli.main(["fake", "3"]) == 130
        assert capsys.readouterr().err == "tritontower: interrupted\n"

    def test_a_broken_pipe_causes_no_traceback(self):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "tritontower", "--help"]
        process = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
        os.close(write)
        assert (process.returncode, process.stderr) == (141, b"")


class TestOptions:
    @pytest.mark.parametrize(
        ("parse", "text", "value"),
        [
            *((options.dtype_name, name, name) for name in ("float32", "float16", "bfloat16", "auto")),
            (options.dtype_name, "torch.float16", "float16"),
            (options.image_size, "1024x768", (1024, 768)),
            (options.image_path, "a.png", Path("a.png")),
            (options.output_file, "new", Path("new")),
        ],
    )
    def test_accepted_texts(self, parse, text, value, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("a.png").touch()
        assert parse(text) == value

    @pytest.mark.parametrize(
        ("parse", "text", "message"),
        [
            *((options.positive_integer, text, "whole number") for text in ("0", "-3", "1.5", "", "1e3", "9" * 30)),
            (options.image_size, "1024", "WIDTHxHEIGHT"),
            (options.image_path, "https://example.org/a.png", "got the URL"),
            (options.image_path, "b.png", "got no file"),
            (options.image_path, ".", "got the folder"),
            (options.output_file, ".", "got the folder"),
            (options.output_file, "absent/new", "must be in an existing folder"),
        ],
    )
    def test_refused_texts(self, parse, text, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse(text)

    @pytest.mark.parametrize("command", ["inspect", "encode", "parity"])
    def test_int8_gets_one_line(self, command, capsys):
        assert cli.main([command, "somewhere", "--dtype", "int8"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert "--dtype: must be one of float32, float16, bfloat16, auto, got 'int8'" in line


OLD_GPU = replace(GPU, architecture="sm_75")
BROKEN_TORCHVISION = {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}


class TestProblems:
    @pytest.mark.parametrize(
        ("environment", "problem", "remedy"),
        [
            (GOOD, None, None),
            (replace(GOOD, accelerators=(GPU,), gpu_driver=True), None, None),
            (replace(GOOD, accelerators=(replace(GPU, architecture="gfx942"),), gpu_driver=True), None, None),
            (_with(torch="2.14.0.dev20261001+cu130", triton="3.8.0+git1234"), None, None),
            (_with(triton=None), None, None),
            (_with(torchvision="0.28.0"), None, None),
            (_with(triton="3.6.0", numpy="2.3.9"), None, None),
            (_with(triton="3.5.1", numpy="2.3.9"), "triton 3.5.1 is outside >=3.6,<3.10", "pip install"),
            (_with(triton="3.10.0"), "triton 3.10.0 is outside >=3.6,<3.10", "pip install"),
            (_with(torch="2.10.0+cu130"), "torch 2.10.0+cu130 is outside", "pip install"),
            (_with(numpy="1.25.0"), "numpy 1.25.0 is outside", "pip install"),
            (_with(pillow="12.2.9"), "pillow 12.2.9 is outside", "pip install"),
            (_with(transformers=None), "transformers is not installed", "pip install"),
            (replace(_with(triton=None), accelerators=(GPU,)), "triton is not installed", "pip install"),
            (
                replace(_with(torchvision="0.28.0"), import_errors=BROKEN_TORCHVISION),
                "torchvision 0.28.0 does not import with torch 2.13.0+cpu (RuntimeError: operator torchvision::nms",
                "pip uninstall torchvision",
            ),
            (
                replace(GOOD, import_errors={"torch": "ImportError: libcudart.so.13"}),
                "torch 2.13.0+cpu does not import (ImportError: libcudart.so.13)",
                "reinstall torch",
            ),
            (replace(GOOD, gpu_driver=True), "torch 2.13.0+cpu sees no GPU", "install a CUDA or ROCm build"),
            (replace(GOOD, accelerators=(OLD_GPU,), gpu_driver=True), "is sm_75", "--device cpu"),
        ],
    )
    def test_machines(self, environment, problem, remedy):
        """Good machines have no problem, each broken one has one, with a remedy."""
        found = env.find_problems(environment)
        assert len(found) == (problem is not None)
        for finding in found:
            assert finding.broken
            assert problem in finding.problem
            assert remedy in finding.remedy

    @pytest.mark.parametrize("on_gpu", [False, True])
    def test_interpreter_variable_is_broken_only_on_a_gpu(self, on_gpu):
        environment = replace(GOOD, variables={"TRITON_INTERPRET": "1"}, accelerators=(GPU,) if on_gpu else ())
        (finding,) = env.find_problems(environment)
        assert finding.broken == on_gpu
        assert "unset TRITON_INTERPRET" in finding.remedy

    @pytest.mark.parametrize("interprets", [False, True])
    def test_new_numpy_breaks_only_the_old_interpreter(self, interprets):
        environment = replace(
            _with(triton="3.6.0", numpy="2.4.6"), variables={"TRITON_INTERPRET": "1"} if interprets else {}
        )
        (finding,) = [finding for finding in env.find_problems(environment) if "numpy" in finding.problem]
        assert finding.broken == interprets

    def test_broken_findings_come_first(self):
        environment = _with(triton="3.6.0", transformers=None)
        assert [finding.broken for finding in env.find_problems(environment)] == [True, False]


class TestReport:
    def test_text(self):
        environment = replace(GOOD, accelerators=(GPU,), gpu_driver=True)
        text = env.describe(environment, env.find_problems(environment))
        assert "cuda:0  A fine GPU          sm_90         80 GiB  Triton kernels" in text
        assert "bfloat16 by avx512_bf16" in text
        assert text.endswith("No known problems.")

    def test_problems_come_with_remedies(self):
        environment = _with(triton="3.5.0", numpy="2.4.0")
        text = env.describe(environment, env.find_problems(environment))
        assert 'PROBLEM: triton 3.5.0 is outside >=3.6,<3.10\n  → pip install "triton>=3.6,<3.10"' in text
        assert "note: the interpreter of triton 3.5.0 fails with numpy 2.4.0" in text

    @pytest.mark.parametrize(("environment", "code"), [(GOOD, 0), (_with(torch="1.13"), 1)])
    def test_exit_code_and_json(self, environment, code, monkeypatch, capsys):
        monkeypatch.setattr(env, "observe", lambda: environment)
        assert cli.main(["env", "--json"]) == code
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is (code == 0)
        assert report["packages"] == dict(environment.packages)
        assert len(report["findings"]) == code

    def test_this_machine(self):
        environment = env.observe()
        assert environment.packages["torch"] is not None
        assert environment.cpu_backend == "reference"  # selected by the tests
        assert environment.cpu_cores >= 1
        assert "torch" not in environment.import_errors

    def test_a_package_that_fails_to_import_is_found(self, tmp_path, monkeypatch):
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms\\n does not exist')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        errors = env.observe().import_errors
        assert errors["torchvision"] == "RuntimeError: operator torchvision::nms does not exist"
