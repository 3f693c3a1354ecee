"""Tuner and journal: which candidates are dropped and chosen, and how a run resumes; compilers and the GPU are stand-ins."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.processes import ROOT, run_python
from support.tuning import QWEN2, StandInGauge, find_task, small_tasks, stand_in_compiler, tasks_for

from tritontower.benchmarks.measuring import Timing
from tritontower.errors import BackendUnavailableError
from tritontower.kernels.runtime import config as configs
from tritontower.tuning import tuner
from tritontower.tuning.candidate import Choice
from tritontower.tuning.journal import Journal
from tritontower.tuning.search_space import default_values, shared_fields
from tritontower.tuning.tasks import PATCHES, Task
from tritontower.tuning.tuner import Gauge, choose, compile_tasks

pytest.importorskip("triton", reason="tuning needs Triton, which ships for Linux only")

TASK = find_task(tasks_for(QWEN2), "mlp.up")


@pytest.fixture(autouse=True)
def compiler(monkeypatch) -> dict[str, Any]:
    """Compiles at once; what ``spills`` selects breaks a rule."""
    state: dict[str, Any] = {"spills": lambda values: False}
    monkeypatch.setattr(tuner, "compile_orders", stand_in_compiler(lambda values: state["spills"](values)))
    return state


def choose_one(gauge: Gauge, journal: Journal | None = None) -> Choice:
    (choice,) = choose([TASK], gauge, architecture="sm_90", journal=journal)
    return choice


def is_vendor(config: Mapping[str, Any]) -> bool:
    return bool(config.get("vendor"))


class TestCompiling:
    def test_a_second_round_follows_if_few_survive(self, compiler):
        first = compile_tasks([TASK], "sm_90")[TASK]
        assert not any(each.dropped for each in first)
        assert first[0].config == default_values(TASK, "sm_90") or is_vendor(first[0].config)
        compiler["spills"] = lambda values: values["operands"] == "descriptors" or values["num_warps"] == 8
        second = compile_tasks([TASK], "sm_90", compiled=3)[TASK]
        assert len(second) == 6
        assert {each.dropped for each in second if each.dropped} == {
            "spills registers (9 instructions, 0 bytes of stack)"
        }

    def test_tasks_after_the_deadline_are_missing(self):
        tasks = tasks_for(QWEN2)
        assert compile_tasks(tasks, "sm_90", deadline=time.monotonic() - 1) == {}


class TestChoosing:
    def test_the_fastest_correct_candidate_is_chosen(self):
        """The vendor GEMM is fastest; it is chosen unless its result is wrong."""

        def times(task: Task, config: Mapping[str, Any]) -> float:
            return 5.0 if config["vendor"] else 20.0 - config["num_warps"]

        wrong = StandInGauge(times, lambda config: "wrong by a lot" if config["vendor"] else "")
        choice = choose_one(wrong)
        assert not choice.best.config["vendor"]
        assert (choice.best.microseconds, choice.best.error) == (12.0, 0.002)
        assert [each.dropped for each in choice.dropped if is_vendor(each.config)] == ["wrong by a lot"]
        assert not any(config["vendor"] for config in wrong.timed)

        choice = choose_one(StandInGauge(times))
        assert choice.best.config["vendor"]
        assert choice.speedup == pytest.approx(12 / 5)
        assert choice.runner_up is not None
        assert choice.tflops == pytest.approx(2 * 1024 * 5120 * 1280 / 5e-6 / 1e12)

    def test_the_default_is_kept_if_little_is_gained(self):
        default = default_values(TASK, "sm_90")
        choice = choose_one(StandInGauge(lambda task, config: 10.1 if dict(config) == default else 10.0))
        assert choice.best.config == default
        assert choice.speedup == 1

    def test_only_the_vendor_gemm_is_left_if_nothing_compiles(self, compiler):
        compiler["spills"] = lambda values: True
        choice = choose_one(StandInGauge())
        assert choice.best.config["vendor"]
        assert choice.speedup is None

    def test_a_failing_launch_is_dropped(self):
        def times(task: Task, config: Mapping[str, Any]) -> float:
            if config["vendor"]:
                raise RuntimeError("out of resource: shared memory")
            return 10.0

        (dropped,) = [each for each in choose_one(StandInGauge(times)).dropped if is_vendor(each.config)]
        assert dropped.dropped == "fails on the GPU: RuntimeError: out of resource: shared memory"
        assert dropped.cost == math.inf

    def test_sizes_agree_in_the_fields_that_decide_the_order_of_sums(self):
        tasks = [task for task in tasks_for(QWEN2, PATCHES) if task.kernel == "attention.attention"]

        def times(task: Task, config: Mapping[str, Any]) -> float:
            # Long segments, which take most of the time, prefer 64 keys; short ones prefer 128.
            is_long = task.get("longest") > 4096
            return task.get("longest") * (1.0 if (config["block_keys"] == 64) == is_long else 2.0)

        for architecture in ("sm_90", "sm_100"):
            choices = choose(tasks, StandInGauge(times), architecture=architecture)
            assert [choice.task for choice in choices] == tasks
            assert {choice.best.config["block_keys"] for choice in choices} == {64}
            names = shared_fields("attention.attention", architecture)
            assert len({tuple(choice.best.config[name] for name in names) for choice in choices}) == 1

    def test_the_deadline_keeps_finished_tasks(self):
        slow = StandInGauge(lambda task, config: time.sleep(0.02) or 10.0)
        tasks = tasks_for(QWEN2)
        choices = choose(tasks, slow, architecture="sm_90", deadline=time.monotonic() + 1.0)
        assert 0 < len(choices) < len(tasks)


class TestJournal:
    def test_a_second_run_measures_nothing_again(self, tmp_path):
        path, first, second, elsewhere = tmp_path / "journal", StandInGauge(), StandInGauge(), StandInGauge()
        choose_one(first, Journal(path, "here"))
        with path.open("a") as file:
            file.write('{"key": "cut o')
        assert choose_one(second, Journal(path, "here")).best.microseconds == 10
        assert second.timed == []
        choose_one(elsewhere, Journal(path, "another GPU"))
        assert elsewhere.timed == first.timed != []

    def test_a_torn_line_swallows_no_result(self, tmp_path):
        path = tmp_path / "journal"
        path.write_text('{"key": "cut o')
        Journal(path, "").write("a", microseconds=1.0, error=0.0, dropped="")
        assert Journal(path, "").known.keys() == {"a"}

    def test_a_fatal_gpu_error_ends_the_run_once(self, tmp_path):
        """Everything after it would fail; the next run leaves the culprit out."""

        def times(task: Task, config: Mapping[str, Any]) -> float:
            if config["vendor"]:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return 10.0

        path = tmp_path / "journal"
        with pytest.raises(BackendUnavailableError, match="illegal memory access"):
            choose_one(StandInGauge(times), Journal(path, ""))
        dropped = choose_one(StandInGauge(times), Journal(path, "")).dropped
        assert [is_vendor(each.config) for each in dropped] == [True]

    def test_a_fatal_configuration_is_begun_at_most_twice(self, tmp_path):
        """The process ends at the vendor GEMM, without a message, whenever it is measured."""
        script = f"""
import os
from pathlib import Path
from support.tuning import *
from tritontower.tuning import tuner
from tritontower.tuning.journal import Journal
tuner.compile_orders = stand_in_compiler(lambda values: False)
gauge = StandInGauge(lambda task, config: os._exit(139) if config["vendor"] else 10.0)
task = find_task(tasks_for(QWEN2), "mlp.up")
(choice,) = tuner.choose([task], gauge, architecture="sm_90", journal=Journal(Path({str(tmp_path / "journal")!r}), ""))
print([each.dropped for each in choice.dropped], choice.best.config["vendor"])
"""
        environment = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        runs = [run_python("-c", script, environment=environment, timeout=300) for _ in range(3)]
        assert [each.returncode for each in runs] == [139, 139, 0], runs[-1].stderr
        assert runs[-1].stdout.strip() == "['ended the process 2 times, or was killed while it hung'] False"

    def test_an_interruption_is_not_the_configurations_fault(self, tmp_path):
        interruptions = iter(range(3))

        def times(task: Task, config: Mapping[str, Any]) -> float:
            if config["vendor"] and next(interruptions, None) is not None:
                raise KeyboardInterrupt
            return 10.0

        path = tmp_path / "journal"
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                choose_one(StandInGauge(times), Journal(path, ""))
        assert choose_one(StandInGauge(times), Journal(path, "")).dropped == []


class TestGauge:
    task = next(task for task in small_tasks(QWEN2, "float32") if task.node == "mlp.up")

    def test_uncaptured_times_are_not_compared_with_captured_ones(self, monkeypatch):
        values = default_values(self.task, "interpreter")

        def measure(captures: bool, method: str) -> float:
            monkeypatch.setattr(tuner, "can_capture", lambda device: captures)
            monkeypatch.setattr(tuner, "time_on_device", lambda call, **options: Timing((1e-6,), method))
            return Gauge(torch.device("cpu")).microseconds(self.task, values)

        assert measure(True, "graph") == measure(False, "events") == pytest.approx(1)
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            measure(True, "events")

    def test_wrong_and_varying_results_are_found(self, monkeypatch, kernel_device):
        values = default_values(self.task, configs.architecture(kernel_device))
        gauge = Gauge(kernel_device)
        monkeypatch.setattr(tuner, "REPEATS", 2)
        error, problem = gauge.error(self.task, values)
        assert error < 1e-5
        assert problem == ""
        assert gauge.microseconds(self.task, values) > 0
        prepare = tuner.prepare

        def spoil(change: Any) -> None:
            def spoilt(*arguments: Any, **options: Any) -> Any:
                operation = prepare(*arguments, **options)

                def function(*, config: Any = None, **tensors: Any) -> None:
                    operation.function(**tensors, **({} if config is None else {"config": config}))
                    if config is not None:
                        tensors["out"][3] += change(tensors["out"][3])

                return replace(operation, function=function)

            monkeypatch.setattr(tuner, "prepare", spoilt)

        spoil(torch.ones_like)
        assert gauge.error(self.task, values)[1].startswith("wrong by ")
        spoil(lambda row: torch.rand_like(row) * 1e-7)
        assert gauge.error(self.task, values)[1] == "two launches on the same rows differ"
