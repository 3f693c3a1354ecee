"""AOT compilation of tasks: real compiles, what is cached, and how an interrupted run resumes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tuning import QWEN2, compile_one_task, compiled, find_task, tasks_for

from tritontower.models.common.registry import list_summaries
from tritontower.tuning.compile import aot_compile
from tritontower.tuning.compile.aot_compile import CompileResult, Order, compile_orders, digest, representative
from tritontower.tuning.search_space import default_values

pytest.importorskip("triton", reason="compiling needs Triton, which ships for Linux only")

FITS = {"block_rows": 128, "block_columns": 128, "block_inner": 64, "group_rows": 8, "num_warps": 8, "num_stages": 3}
SPILLS = {**FITS, "block_columns": 256, "num_warps": 4}
TASK = find_task(tasks_for(QWEN2), "attention_output")


def order(values: Mapping[str, Any], architecture: str = "sm_90") -> Order:
    return Order(TASK, tuple(sorted(values.items())), architecture)


def problems(result: CompileResult) -> list[str]:
    return result.problems(TASK, "sm_90")


def test_real_compiles_are_judged_and_kept(tmp_path):
    """One configuration fits, one spills, one is invalid; the second run compiles none of them."""
    orders = [order(FITS), order(SPILLS), order({**FITS, "num_warps": "many"}), order(FITS)]
    found = dict(compile_orders(orders, workers=2, cache=tmp_path))
    assert len(found) == 4
    assert found[0] == found[3]
    assert problems(found[0]) == []
    assert found[0].main.kernel == "_linear_kernel"
    assert 50 < found[0].main.registers < 256
    assert found[0].main.loop_instructions is not None
    assert problems(found[1])[0].startswith("spills registers (")
    assert "must be the fields of a configuration" in problems(found[2])[0]
    again = dict(compile_orders(orders, cache=tmp_path))
    assert again == found
    assert all(each.is_cached for each in again.values())
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_sizes_share_a_compile():
    few, many = (
        Order(
            find_task(tasks_for(QWEN2, (patches,)), "mlp.up"), tuple(sorted({**FITS, "split": split}.items())), "sm_90"
        )
        for patches, split in ((1024, 2), (16384, 4))
    )
    assert digest(few) == digest(many)
    assert len({digest(few), digest(replace(few, architecture="sm_80")), digest(order(FITS))}) == 3


def test_a_representative_has_the_divisibility_of_its_order():
    """Kernels are specialized on whether blocks divide K and whether rows start at multiples of 16."""
    for summary in list_summaries():
        for task in tasks_for(summary, (256,)):
            values = tuple(sorted(default_values(task, "sm_90").items()))
            other = representative(Order(task, values, "sm_90")).task
            assert representative(Order(other, values, "sm_90")).task == other
            if task.kernel.startswith("gemm."):
                for depth in (16, 32, 64, 128):
                    assert (task.get("inner") % depth == 0) == (other.get("inner") % depth == 0)
                assert (task.get("columns") % 16 == 0) == (other.get("columns") % 16 == 0)


def test_a_damaged_file_is_compiled_again(tmp_path, monkeypatch):
    answer = CompileResult((compiled(),))
    asked: list[int] = []

    def answers(orders: Sequence[Any], code: str, **options: Any) -> Iterator[tuple[int, Any]]:
        asked.append(len(orders))
        yield from ((index, answer) for index in range(len(orders)))

    monkeypatch.setattr(aot_compile, "answers", answers)
    assert len(dict(compile_orders([order(FITS)], cache=tmp_path))) == 1
    (path,) = tmp_path.iterdir()
    for text in ("", "{", '{"error": null, "launches": [{"registers": 1}]}', "[]"):
        path.write_text(text)
        assert dict(compile_orders([order(FITS)], cache=tmp_path))[0].main == compiled()
    assert asked == [1] * 5


@pytest.mark.parametrize(
    ("end", "is_kept"),
    [
        ("os.kill(os.getpid(), 9)", False),
        ("os._exit(1)", False),
        ("os._exit(134)", True),
        ("CompileResult(error='PassManager::run failed')", True),
    ],
)
def test_only_failures_of_the_compiler_are_kept(tmp_path, monkeypatch, end, is_kept):
    code = f"""
import os
from tritontower.tuning.compile.aot_compile import CompileResult, answer_orders
answer_orders(lambda order: {end})"""
    monkeypatch.setattr(aot_compile, "CHILD", code)
    (found,) = dict(compile_orders([order(FITS)], cache=tmp_path)).values()
    assert problems(found)[0].startswith("does not compile: ")
    assert len(list(tmp_path.glob("*.json"))) == is_kept


def test_the_cache_depends_on_kernel_and_assembler(monkeypatch):
    before = digest(order(FITS))
    monkeypatch.setattr(aot_compile.tuned_tables, "source_digest", lambda kernel: "0" * 12)
    assert digest(order(FITS)) != before
    monkeypatch.undo()
    assert digest(order(FITS)) == before
    monkeypatch.setattr(aot_compile, "assembler_version", lambda architecture: "99")
    assert digest(order(FITS)) != before


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    """The results that the killed process finished are there, and the next run compiles the rest."""
    cache = tmp_path / "cache"
    tests = Path(__file__).parents[2]
    script = f"import pathlib, support.tuning\nsupport.tuning.compile_one_task(pathlib.Path({str(cache)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 300
    while not list(cache.glob("*.json")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.json")}
    assert kept
    first = compile_one_task(cache)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(cache.glob("*.json"))) >= len(kept)
    monkeypatch.setattr(aot_compile, "CHILD", "raise SystemExit(1)")
    assert compile_one_task(cache) == first
