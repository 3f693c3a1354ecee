"""Tuning: what there is to tune, what may be tried, what is dropped, and what is chosen; the GPU is a stand-in."""

import json
import math
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
import torch

from tritontower import VisionTower
from tritontower.benchmarks.measuring import Timing
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.demo.random_checkpoint import write_random_checkpoint
from tritontower.errors import BackendUnavailableError
from tritontower.kernels.attention import attention as flash_attention
from tritontower.kernels.gemm import linear, patch_projection, qkv_projection
from tritontower.kernels.rowwise import norm
from tritontower.kernels.runtime import config as configs
from tritontower.kernels.runtime import tables
from tritontower.kernels.runtime.config import ARCHITECTURES, SHARED_MEMORY_LIMIT
from tritontower.models import gemma3, qwen2_5_vl, qwen2_vl, qwen3_vl
from tritontower.models.common.registry import read_family
from tritontower.tuning import tuner
from tritontower.tuning.build_tables import published_tasks
from tritontower.tuning.compile import aot_compile, worker
from tritontower.tuning.compile.aot_compile import CompileResult, Launch, Order, compile_orders, problems
from tritontower.tuning.compile.worker import Death
from tritontower.tuning.journal import Journal
from tritontower.tuning.operations import CONFIGS, prepare
from tritontower.tuning.predict import CHIPS, Compiled, attention_time, product_time
from tritontower.tuning.search_space import candidates, default_fields, guess, predict, uniform
from tritontower.tuning.table_writer import entries_of, read_checked, replace_table, static_identity, table_key
from tritontower.tuning.tasks import PATCHES, Task, tasks_of
from tritontower.tuning.tuner import Candidate, Gauge, choose_measured, choose_static, distance

pytest.importorskip("triton", reason="tuning needs Triton, which ships for Linux only")

(QWEN2,), (QWEN2_5,) = qwen2_vl.SUMMARIES, qwen2_5_vl.SUMMARIES
GEMMA3 = gemma3.SUMMARIES[0]
BF16 = torch.bfloat16


def tasks_for(summary: Any, patches: Sequence[int] = (1024,), dtype: torch.dtype = BF16) -> list[Task]:
    return tasks_of(read_family(ConfigReader(summary.example)).config, patches, dtype)


def named(tasks: Sequence[Task], node: str) -> Task:
    (found,) = (task for task in tasks if task.node == node)
    return found


def launch(**changes: Any) -> Launch:
    facts: dict[str, Any] = {
        "kernel": "_k", "num_warps": 4, "threads": 128, "registers": 128, "spills": 0, "stack": 0,
        "shared_memory": 65536, "occupancy": 2, "tensor_core": {"HGMMA": 8, "UTCHMMA": 8}, "instructions": 600,
        "loop_instructions": 100,
    }  # fmt: skip
    return Launch(**{**facts, **changes})


class TestTasks:
    def test_qwen2_vl(self):
        tasks = tasks_for(QWEN2)
        assert named(tasks, "attention").launches == 32
        assert dict(named(tasks, "attention").sizes) == {"longest": 1024}
        assert {task.kernel for task in tasks} == set(CONFIGS)
        up = named(tasks, "mlp.up")
        assert dict(up.constants) == {"columns": 5120, "inner": 1280, "activation": "quick_gelu", "residual": False}
        assert dict(named(tasks, "projector.1").sizes) == {"rows": 256}
        assert len({task.key for task in tasks}) == len(tasks)

    def test_windows_and_gates(self):
        tasks = tasks_for(QWEN2_5, (4096,))
        attentions = [task for task in tasks if task.kernel == "attention"]
        bounds = {task.fact("bounded"): task for task in attentions}
        assert bounds.keys() == {0, 64}
        assert bounds[0].launches == 4
        assert bounds[64].launches == 28
        assert dict(bounds[64].sizes) == {"longest": 64}
        assert any(task.fact("activation") == "silu_gated_interleaved" for task in tasks if task.kernel == "linear")

    def test_padded_heads_and_images_of_one_size(self):
        tasks = tasks_for(GEMMA3, (100, 4096, 5000))
        attention = named(tasks, "attention")
        assert dict(attention.constants) == {"head_dim": 72, "padded": True, "bounded": 4096}
        assert attention.fact("width") == 80
        assert attention.fact("queries_scaled")
        projection = named(tasks, "qkv")
        assert projection.fact("query_scale") * math.log(2) == pytest.approx(72**-0.5)
        assert not any(fields.get("vendor") for fields in candidates(projection, "sm_90", measured=True))
        assert {task.fact("rows") for task in tasks if task.node == "patch_projection"} == {4096}

    def test_sizes_in_one_bucket_are_one_task(self):
        assert len(tasks_for(QWEN2, (1024, 1030))) == len(tasks_for(QWEN2, (1024,)))
        assert len(tasks_for(QWEN2, (1024, 2048))) == 2 * len(tasks_for(QWEN2, (1024,)))

    @pytest.mark.parametrize(
        ("summary", "small"),
        [
            (QWEN2, {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 96}),
            (
                QWEN2_5,
                {
                    "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 100, "out_hidden_size": 96,
                    "fullatt_block_indexes": [1],
                },
            ),
            (
                qwen3_vl.SUMMARIES[0],
                {
                    "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 96,
                    "deepstack_visual_indexes": [0],
                },
            ),
        ],
        ids=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"],
    )  # fmt: skip
    def test_names_are_those_that_the_kernels_ask_by(self, summary, small, tmp_path, monkeypatch, kernel_device):
        """A tower runs in the interpreter; what its kernels ask the tables for is what there is to tune."""
        example = {**summary.example, "vision_config": {**summary.example["vision_config"], **small}}
        folder = write_random_checkpoint(tmp_path / "model", example, summary.processor, dtype=torch.float32)
        tower = VisionTower.from_pretrained(folder, device=kernel_device)
        asked: dict[Any, set[tuple[str, ...]]] = {}

        def ask(kernel: str, device: Any, dtype: Any, constants: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
            group = (kernel, tables.dtype_name(dtype), tuple(sorted(constants.items())))
            asked.setdefault(group, set()).add(tuple(sizes))

        for module in (flash_attention, linear, norm, patch_projection, qkv_projection):
            monkeypatch.setattr(module, "tuned", ask)
        tower.encode([torch.rand(3, 56, 56).mul(255).to(torch.uint8).permute(1, 2, 0).numpy()])
        listed = {
            task.group: tuple(name for name, _ in task.sizes) for task in tasks_of(tower.config, (16,), torch.float32)
        }
        assert set(listed) - set(asked) == set() == set(asked) - set(listed)
        assert all(asked[group] == {names} for group, names in listed.items())


class TestSpace:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_tables_know_whose_sizes_agree(self, architecture):
        agreeing = {kernel for kernel in CONFIGS if uniform(kernel, architecture)}
        assert agreeing == set(tables.SAME_FOR_ALL_SIZES)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("dtype", [BF16, torch.float32])
    def test_every_candidate_is_a_configuration(self, architecture, dtype):
        for task in tasks_for(QWEN2, (64, 4096), dtype) + tasks_for(GEMMA3, (4096,), dtype):
            default = default_fields(task, architecture)
            assert tables.configuration(CONFIGS[task.kernel], default) is not None
            found = candidates(task, architecture)
            assert found, task.title
            assert all(tables.configuration(CONFIGS[task.kernel], fields) is not None for fields in found)
            assert all(set(fields) == set(default) for fields in found)

    def test_what_only_a_gpu_can_vouch_for_is_listed_for_gpus_only(self):
        for task in tasks_for(QWEN2):
            for architecture in ("sm_80", "sm_90"):
                static = candidates(task, architecture)
                assert not any(tables.unproven(fields) for fields in static)
                measured = candidates(task, architecture, measured=True)
                assert any(fields.get("vendor") for fields in measured) == (task.kernel == "linear")
                special = any(fields.get("variant") == "specialized" for fields in measured)
                assert special == (task.kernel == "attention" and architecture == "sm_90")

    def test_vendor_knows_no_gates(self):
        gated = [task for task in tasks_for(QWEN2_5) if "gated" in str(dict(task.constants).get("activation"))]
        assert gated
        assert not any(fields.get("vendor") for task in gated for fields in candidates(task, "sm_90", measured=True))

    def test_products_fit_shared_memory(self):
        for architecture in ARCHITECTURES:
            for task in [task for task in tasks_for(QWEN2) if task.kernel == "linear"]:
                for fields in candidates(task, architecture):
                    tile = (fields["block_rows"] + fields["block_columns"]) * fields["block_inner"] * 2
                    assert tile * fields["num_stages"] <= SHARED_MEMORY_LIMIT[architecture]

    def test_k_is_cut_only_for_few_rows(self):
        few, many = (named(tasks_for(QWEN2, (patches,)), "mlp.down") for patches in (64, 16384))
        assert {fields["split"] for fields in candidates(few, "sm_90")} > {1, 2, 4}
        assert {fields["split"] for fields in candidates(many, "sm_90")} == {1}

    def test_the_likeliest_comes_first(self):
        task = named(tasks_for(QWEN2), "mlp.up")
        found = candidates(task, "sm_90")
        costs = [predict(task, "sm_90", fields, guess(task, "sm_90", fields)) for fields in found]
        assert costs == sorted(costs)


class TestPrediction:
    """Held against published figures: their source is in the module's description."""

    def attention(self, head_dim: int, instructions: float, **changes: Any) -> float:
        blocks = {"block_queries": 128, "block_keys": 128}
        compiled = Compiled(128, 128, 2, instructions * 128 * 128 / 128)
        sizes = {"rows": 16384, "length": 16384, "heads": 16, "head_dim": head_dim, "computed_dim": head_dim}
        return attention_time("sm_90", compiled, **{**sizes, **blocks, **changes}).tflops

    def test_triton_tutorial_at_head_dim_64(self):
        assert self.attention(64, 6.9) == pytest.approx(403, rel=0.15)

    def test_columns_that_pad_are_no_use(self):
        assert self.attention(72, 7.0, computed_dim=80) < 0.95 * self.attention(80, 7.0)

    def test_more_instructions_take_longer(self):
        assert self.attention(80, 9.0) < self.attention(80, 7.0)

    def product(self, rows: int, **changes: Any) -> float:
        facts = {"columns": 5120, "inner": 1280, "block_rows": 128, "block_columns": 256, "block_inner": 64, **changes}
        return product_time("sm_90", Compiled(256, 256, 1, 90, 900), rows=rows, **facts).microseconds

    def test_waves(self):
        """A tile more than the multiprocessors take is a wave more, and one less is none less."""
        tiles = CHIPS["sm_90"].multiprocessors // 20
        full = self.product(128 * tiles)
        assert self.product(128 * tiles - 100) == pytest.approx(full)
        assert self.product(128 * tiles + 1) > 1.5 * full

    def test_products_stay_below_the_peak(self):
        seconds = self.product(16384) / 1e6
        assert 0.4 < 2 * 16384 * 5120 * 1280 / seconds / CHIPS["sm_90"].peak < 0.93

    def test_few_rows_cost_what_the_weights_do(self):
        facts = {"columns": 8192, "inner": 8192}
        assert self.product(16, **facts, split=4) >= 2 * 8192 * 8192 / CHIPS["sm_90"].memory * 1e6

    def test_cutting_k_pays_for_few_rows_only(self):
        facts = {"columns": 1280, "inner": 5120, "block_columns": 128}
        assert self.product(64, **facts, split=4) < self.product(64, **facts)
        assert self.product(16384, **facts, split=4) > self.product(16384, **facts)


class TestOperations:
    """The numbers that a configuration is held against are right, and wrong ones are told from them."""

    @pytest.mark.parametrize("summary", [QWEN2, QWEN2_5, GEMMA3], ids=["qwen2_vl", "qwen2_5_vl", "gemma3"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_kernels_pass(self, summary, dtype, kernel_device):
        for task in small_tasks(summary, dtype):
            for hard in (False, True):
                operation = prepare(task, kernel_device, hard=hard)
                found = operation.run(default_fields(task, configs.architecture(kernel_device)))
                error, worst = distance(found, operation.expected())
                assert error < tuner.error_limit(dtype), (task.title, hard)
                assert worst < 5 * tuner.error_limit(dtype), (task.title, hard)

    def test_foreign_fields(self):
        task = small_tasks(QWEN2, "float32")[0]
        with pytest.raises(ValueError, match="not the fields of a configuration"):
            prepare(task, torch.device("cpu")).run({"nonsense": 1})

    @pytest.mark.parametrize("spoil", ["row", "nan", "all"])
    def test_distance(self, spoil):
        expected = torch.randn(1000, 64)
        assert distance(expected.clone(), expected) == (0, 0)
        found = expected.clone()
        if spoil == "row":
            found[17] = 0
        elif spoil == "nan":
            found[3, 5] = math.nan
        else:
            found *= 1.02
        error, worst = distance(found, expected)
        assert worst > 5 * tuner.error_limit("bfloat16") or error > tuner.error_limit("bfloat16")


def small_tasks(summary: Any, dtype: str) -> list[Task]:
    """The kinds of launches of a tower, as small as the interpreter likes them."""
    kinds: dict[Any, Task] = {}
    for task in tasks_for(summary, (64,), getattr(torch, dtype)):
        facts = dict(task.constants)
        shrunk = {
            name: min(value, 96) if name in ("columns", "inner", "width") else value for name, value in facts.items()
        }
        others = dict(task.facts)
        if task.kernel == "qkv_projection":
            shrunk["columns"] = 3 * 2 * (others["padded_head_dim"] or facts["head_dim"])
        others |= {name: value for name, value in {"heads": 2, "rows": 70}.items() if name in others}
        sizes = dict.fromkeys(dict(task.sizes), 70)
        if facts.get("bounded"):
            sizes, shrunk["bounded"] = {"longest": 64}, 64
        small = replace(
            task,
            constants=tuple(sorted(shrunk.items())),
            sizes=tuple(sorted(sizes.items())),
            facts=tuple(sorted(others.items())),
        )
        kinds.setdefault((task.kernel, *(value for value in facts.values() if not isinstance(value, int))), small)
    return list(kinds.values())


# -- compiling --------------------------------------------------------------------------------------------------------

FITS = {"block_rows": 128, "block_columns": 128, "block_inner": 64, "group_rows": 8, "num_warps": 8, "num_stages": 3}
SPILLS = {**FITS, "block_columns": 256, "num_warps": 4}


def order(fields: Mapping[str, Any], architecture: str = "sm_90", node: str = "attention_output") -> Order:
    return Order(named(tasks_for(QWEN2), node), tuple(sorted(fields.items())), architecture)


class TestCompileOrders:
    def test_real_compiles(self, tmp_path):
        """One that fits, one that spills, one that no kernel takes; kept, and not done again."""
        orders = [order(FITS), order(SPILLS), order({**FITS, "num_warps": "many"}), order(FITS)]
        found = dict(compile_orders(orders, workers=2, cache=tmp_path))
        assert len(found) == 4
        assert found[0] == found[3]
        assert not problems(found[0], "sm_90", "bfloat16")
        assert found[0].main.kernel == "_linear_kernel"
        assert 50 < found[0].main.registers < 256
        assert problems(found[1], "sm_90", "bfloat16")[0].startswith("spills registers (")
        assert "not the fields of a configuration" in problems(found[2], "sm_90", "bfloat16")[0]
        again = dict(compile_orders(orders, cache=tmp_path))
        assert again == found
        assert all(each.cached for each in again.values())
        assert len(list(tmp_path.glob("*.json"))) == 3

    def test_sizes_share_a_compile(self):
        few, many = (
            Order(
                named(tasks_for(QWEN2, (patches,)), "mlp.up"), tuple(sorted({**FITS, "split": split}.items())), "sm_90"
            )
            for patches, split in ((1024, 2), (16384, 4))
        )
        assert aot_compile._digest(few) == aot_compile._digest(many)
        assert aot_compile._digest(few) != aot_compile._digest(replace(few, architecture="sm_80"))
        assert aot_compile._digest(few) != aot_compile._digest(order(FITS))

    def test_a_stand_in_is_as_even_as_what_it_stands_for(self):
        """Whether blocks divide K, and whether rows begin at multiples of 16, is what a kernel is specialized on."""
        for task in published_tasks():
            fields = tuple(sorted(default_fields(task, "sm_90").items()))
            other = aot_compile.stand_in(Order(task, fields, "sm_90")).task
            assert aot_compile.stand_in(Order(other, fields, "sm_90")).task == other
            if task.kernel in ("linear", "qkv_projection", "patch_projection"):
                for depth in (16, 32, 64, 128):
                    assert (task.fact("inner") % depth == 0) == (other.fact("inner") % depth == 0)
                assert (task.fact("columns") % 16 == 0) == (other.fact("columns") % 16 == 0)

    def test_a_damaged_file_is_compiled_again(self, tmp_path, monkeypatch):
        answer = {"error": None, "launches": [vars(launch())]}
        asked: list[int] = []

        def answers(orders: Sequence[Any], code: str, **options: Any) -> Iterator[tuple[int, Any]]:
            asked.append(len(orders))
            yield from ((index, answer) for index in range(len(orders)))

        monkeypatch.setattr(aot_compile, "answers", answers)
        assert len(dict(compile_orders([order(FITS)], cache=tmp_path))) == 1
        (path,) = tmp_path.iterdir()
        for text in ("", "{", '{"error": null, "launches": [{"registers": 1}]}', "[]"):
            path.write_text(text)
            assert dict(compile_orders([order(FITS)], cache=tmp_path))[0].main == launch()
        assert asked == [1] * 5

    @pytest.mark.parametrize(
        ("end", "kept"),
        [
            ("os.kill(os.getpid(), 9)", False),
            ("os._exit(1)", False),
            ("os.abort()", True),
            ("os._exit(134)", True),
            ("{'error': 'PassManager::run failed', 'launches': []}", True),
        ],
    )
    def test_only_the_compilers_own_failures_are_remembered(self, tmp_path, monkeypatch, end, kept):
        """A process that was killed, for the memory it took or by somebody, says nothing of a configuration."""
        code = f"import os\nfrom tritontower.tuning.compile.worker import answer_orders\nanswer_orders(lambda order: {end})"
        monkeypatch.setattr(aot_compile, "_CHILD", code)
        (found,) = dict(compile_orders([order(FITS)], cache=tmp_path)).values()
        assert problems(found, "sm_90", "bfloat16")[0].startswith("does not compile: ")
        assert len(list(tmp_path.glob("*.json"))) == kept

    def test_nothing_is_yielded_after_the_deadline(self, monkeypatch):
        monkeypatch.setattr(aot_compile, "_CHILD", "import time; time.sleep(1000)")
        start = time.monotonic()
        assert list(compile_orders([order(FITS)], deadline=start + 1)) == []
        assert time.monotonic() - start < 30

    @pytest.mark.parametrize("module", ["operations", "compile_result", "static", "disassembly"])
    def test_what_launches_and_reads_counts(self, tmp_path, monkeypatch, module):
        before = aot_compile._digest(order(FITS))
        owner = aot_compile if module == "compile_result" else getattr(aot_compile, module)
        changed = tmp_path / f"{module}.py"
        changed.write_text(Path(owner.__file__).read_text(encoding="utf-8") + "\nMORE = 1\n", encoding="utf-8")
        monkeypatch.setattr(owner, "__file__", str(changed))
        aot_compile._reading_digest.cache_clear()
        assert aot_compile._digest(order(FITS)) != before
        monkeypatch.undo()
        aot_compile._reading_digest.cache_clear()
        assert aot_compile._digest(order(FITS)) == before

    def test_the_assembler_counts(self, monkeypatch):
        before = aot_compile._digest(order(FITS))
        monkeypatch.setattr(aot_compile, "ptxas_version", lambda capability: f"99.{capability}")
        aot_compile._assembler.cache_clear()
        assert aot_compile._digest(order(FITS)) != before
        assert aot_compile._assembler("gfx942") is None
        aot_compile._assembler.cache_clear()

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"spills": 2}, "spills registers (2 instructions, 0 bytes of stack)"),
            ({"shared_memory": 300_000}, "takes 300000 bytes of shared memory, the limit is 232448"),
            ({"tensor_core": {"HMMA": 8}}, "has no HGMMA instruction"),
        ],
    )
    def test_rules(self, change, problem):
        assert problems(CompileResult((launch(),)), "sm_90", "bfloat16") == []
        assert problems(CompileResult((launch(**change),)), "sm_90", "bfloat16") == [problem]

    def test_warps_that_fetch_are_no_warps_that_compute(self):
        compiled = launch(num_warps=4, threads=384).compiled("sm_90")
        assert (compiled.threads, compiled.working) == (384, 256)
        assert launch().compiled("sm_90").working == 128


class TestChildren:
    def test_a_child_that_cannot_start_fails_all_at_once(self):
        start = time.monotonic()
        found = dict(worker.answers(list(range(50)), "raise SystemExit(3)", workers=2))
        assert found == dict.fromkeys(range(50), Death("the compiler's process ended with 3: without a word"))
        assert time.monotonic() - start < 60

    def test_a_death_costs_one(self):
        code = (
            "import os\nfrom tritontower.tuning.compile.worker import answer_orders\n"
            "answer_orders(lambda order: os._exit(7) if order == 2 else {'twice': 2 * order})"
        )
        found = dict(worker.answers([1, 2, 3, 4], code))
        assert found[1] == Death("the compiler's process ended with 7: without a word")
        assert [found[index] for index in (0, 2, 3)] == [{"twice": 2}, {"twice": 6}, {"twice": 8}]

    def test_an_order_that_hangs_costs_one(self):
        code = (
            "import time\nfrom tritontower.tuning.compile.worker import answer_orders\n"
            "answer_orders(lambda order: time.sleep(order) or {'slept': order})"
        )
        found = dict(worker.answers([0, 1000, 0], code, seconds=10))
        assert found == {0: {"slept": 0}, 1: Death("the compiler took longer than 10 seconds"), 2: {"slept": 0}}

    def test_a_child_that_never_starts_fails_all(self):
        found = dict(worker.answers([1, 2], "import time; time.sleep(1000)", seconds=1))
        assert found == dict.fromkeys(range(2), Death("the compiler took longer than 1 seconds"))

    def test_the_deadline_ends_the_children(self):
        """While an order is worked on, too."""
        code = (
            "import time\nfrom tritontower.tuning.compile.worker import answer_orders\n"
            "answer_orders(lambda order: time.sleep(order) or {})"
        )
        start = time.monotonic()
        assert list(worker.answers([1000, 1000], code, workers=2, deadline=start + 2)) == []
        assert time.monotonic() - start < 30

    def test_closing_ends_the_children(self):
        code = (
            "import time\nfrom tritontower.tuning.compile.worker import answer_orders\n"
            "answer_orders(lambda order: time.sleep(order) or {})"
        )
        found = worker.answers([0, 1000], code)
        assert next(found) == (0, {})
        start = time.monotonic()
        found.close()
        assert time.monotonic() - start < 30


class TestResumption:
    def test_after_a_kill(self, tmp_path, monkeypatch):
        """The process dies without notice; what it compiled is there, whole, and the next run does the rest."""
        cache = tmp_path / "cache"
        script = f"from pathlib import Path\nfrom support.tuning_run import run\nrun(Path({str(cache)!r}))"
        tests = Path(__file__).parents[1]
        path = os.pathsep.join([str(tests), str(tests.parent)])
        child = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path})
        deadline = time.monotonic() + 300
        while not list(cache.glob("*.json")) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept = {path.name: path.read_bytes() for path in cache.glob("*.json")}
        assert kept
        compiled: list[Any] = []
        answers = aot_compile.answers

        def counting(orders: Sequence[Any], *arguments: Any, **options: Any) -> Iterator[Any]:
            compiled.extend(orders)
            return answers(orders, *arguments, **options)

        monkeypatch.setattr(aot_compile, "answers", counting)
        from support.tuning_run import run

        choices = run(cache)
        assert len(choices) == 1
        assert all((cache / name).read_bytes() == content for name, content in kept.items())
        assert len(list(cache.glob("*.json"))) == len(kept) + len(compiled)
        compiled.clear()
        assert [choice.best.config for choice in run(cache)] == [choice.best.config for choice in choices]
        assert compiled == []


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch) -> dict[str, Any]:
    """Compiles at once: everything fits, but for what ``spoilt`` says of a configuration."""
    state: dict[str, Any] = {"spoilt": lambda fields: False, "orders": []}

    def fake(orders: Sequence[Order], **options: Any) -> Iterator[tuple[int, CompileResult]]:
        for index, each in enumerate(orders):
            state["orders"].append(each)
            fields = dict(each.config)
            wrong = {"spills": 9} if state["spoilt"](fields) else {}
            warps = fields["num_warps"]
            yield index, CompileResult((launch(num_warps=warps, threads=32 * warps, **wrong),))

    monkeypatch.setattr(tuner, "compile_orders", fake)
    return state


class StandIn(Gauge):
    """A GPU that answers at once; ``times`` and ``wrong`` say what of a configuration."""

    def __init__(self, times: Any, wrong: Any) -> None:
        super().__init__(torch.device("cpu"))
        self.times, self.wrong = times, wrong
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def error(self, task: Task, config: Mapping[str, Any]) -> tuple[float, str]:
        self.asked.append(("error", dict(config)))
        return (1.0, self.wrong(config)) if self.wrong and self.wrong(config) else (0.002, "")

    def microseconds(self, task: Task, config: Mapping[str, Any]) -> float:
        self.asked.append(("time", dict(config)))
        return float(self.times(task, config))


def gauge(times: Any = lambda task, config: 10.0, wrong: Any = None) -> StandIn:
    return StandIn(times, wrong)


class TestStaticChoice:
    def test_drops_what_spills(self, compiler):
        compiler["spoilt"] = lambda fields: fields.get("block_rows", 0) * fields.get("block_columns", 0) > 128 * 128
        (choice,) = choose_static([named(tasks_for(QWEN2, (16384,)), "mlp.up")], "sm_90")
        assert choice.best.config["block_rows"] * choice.best.config["block_columns"] <= 128 * 128
        assert choice.dropped
        assert all(each.dropped.startswith("spills registers") for each in choice.dropped)

    def test_nothing_that_compiles(self, compiler):
        compiler["spoilt"] = lambda fields: True
        assert choose_static([named(tasks_for(QWEN2), "mlp.up")], "sm_90") == []

    def test_the_default_stays_where_little_is_gained(self, compiler, monkeypatch):
        task = named(tasks_for(QWEN2), "mlp.up")
        monkeypatch.setitem(tuner.MARGIN, "predicted", 1000.0)
        (choice,) = choose_static([task], "sm_90")
        assert choice.best.config == default_fields(task, "sm_90")
        assert choice.gain == 1

    def test_sizes_agree_in_what_decides_the_order_of_sums(self, compiler):
        for architecture in ("sm_90", "sm_100"):
            tasks = [task for task in tasks_for(QWEN2, PATCHES) if task.kernel in ("attention", "patch_projection")]
            choices = choose_static(tasks, architecture)
            assert len(choices) == len(tasks)
            for kernel in ("attention", "patch_projection"):
                of_kernel = [choice for choice in choices if choice.task.kernel == kernel]
                names = uniform(kernel, architecture)
                assert names
                assert len({tuple(choice.best.config[name] for name in names) for choice in of_kernel}) == 1

    def test_norms_stay(self, compiler):
        assert choose_static([task for task in tasks_for(QWEN2) if task.kernel == "norm"], "sm_90") == []

    def test_the_deadline_holds_while_a_compile_runs(self, monkeypatch):
        monkeypatch.setattr(aot_compile, "_CHILD", "import time; time.sleep(1000)")
        start = time.monotonic()
        assert choose_static(tasks_for(QWEN2), "sm_90", workers=2, deadline=start + 1) == []
        assert time.monotonic() - start < 30

    def test_deadline(self, compiler):
        tasks = tasks_for(QWEN2)
        assert choose_static(tasks, "sm_90", deadline=time.monotonic() - 1) == []
        assert len(compiler["orders"]) == 1

    def test_becomes_a_table(self, compiler, tmp_path):
        choices = choose_static(tasks_for(QWEN2, (64, 1024)), "sm_90")
        entries = entries_of(choices, "2026-11-21")
        replace_table(tmp_path / "sm_90.json", table_key(static_identity("sm_90")), entries)
        table = read_checked(tmp_path / "sm_90.json")
        assert len(table.entries) == len(choices)
        assert all(each["microseconds"] is None and each["predicted"]["microseconds"] > 0 for each in table.entries)


class TestMeasuredChoice:
    def task(self) -> Task:
        return named(tasks_for(QWEN2), "mlp.up")

    def test_the_fastest_that_is_right(self, compiler):
        """The vendor's product is fastest and wrong, a tile is next, the default is slow."""

        def times(task: Task, config: Mapping[str, Any]) -> float:
            return 5.0 if config["vendor"] else 20.0 - config["num_warps"]

        wrong = gauge(times, lambda config: "wrong by a lot" if config["vendor"] else "")
        (choice,) = choose_measured([self.task()], wrong, architecture="sm_90")
        assert not choice.best.config["vendor"]
        assert choice.best.microseconds == 12.0
        assert choice.best.error == 0.002
        assert [each.dropped for each in choice.dropped if each.config["vendor"]] == ["wrong by a lot"]
        assert not any(kind == "time" and config["vendor"] for kind, config in wrong.asked)

        (choice,) = choose_measured([self.task()], gauge(times), architecture="sm_90")
        assert choice.best.config["vendor"]
        assert choice.gain == pytest.approx(12 / 5)
        assert choice.runner_up is not None
        assert choice.tflops == pytest.approx(2 * 1024 * 5120 * 1280 / 5e-6 / 1e12)

    def test_what_cannot_be_predicted_is_tried_where_nothing_compiles(self, compiler):
        compiler["spoilt"] = lambda fields: True
        (choice,) = choose_measured([self.task()], gauge(), architecture="sm_90")
        assert choice.best.config["vendor"]

    def test_a_failing_launch_is_dropped(self, compiler):
        def times(task: Task, config: Mapping[str, Any]) -> float:
            if config["vendor"]:
                raise RuntimeError("out of resource: shared memory")
            return 10.0

        (choice,) = choose_measured([self.task()], gauge(times), architecture="sm_90")
        (dropped,) = [each for each in choice.dropped if each.config["vendor"]]
        assert dropped.dropped == "fails on the GPU: RuntimeError: out of resource: shared memory"

    def test_a_launch_that_kills_the_gpu_ends_the_run_once(self, compiler, tmp_path):
        """Whatever came after it would fail for no fault of its own; the next run leaves the culprit out."""

        def times(task: Task, config: Mapping[str, Any]) -> float:
            if config["vendor"]:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return 10.0

        path = tmp_path / "journal"
        with pytest.raises(BackendUnavailableError, match="illegal memory access"):
            choose_measured([self.task()], gauge(times), architecture="sm_90", journal=Journal(path, ""))
        (choice,) = choose_measured([self.task()], gauge(times), architecture="sm_90", journal=Journal(path, ""))
        assert [each.config["vendor"] for each in choice.dropped] == [True]

    def test_entries_are_measured_and_checked(self, compiler, tmp_path):
        choices = choose_measured(tasks_for(QWEN2), gauge(), architecture="sm_90")
        assert {choice.task.kernel for choice in choices} == set(CONFIGS)
        entries = entries_of(choices)
        key = table_key(tables.Identity("NVIDIA Test", "sm_90", "9.0", 132))
        replace_table(tmp_path / "NVIDIA_Test.json", key, entries)
        found = read_checked(tmp_path / "NVIDIA_Test.json").entries
        assert all(each["microseconds"] == 10 and each["verified"] == 0.002 for each in found)

    def test_the_journal_remembers(self, compiler, tmp_path):
        path = tmp_path / "journal"
        first = gauge()
        choose_measured([self.task()], first, architecture="sm_90", journal=Journal(path, "here"))
        assert first.asked
        with path.open("a") as file:
            file.write('{"key": "cut o')
        second = gauge()
        (choice,) = choose_measured([self.task()], second, architecture="sm_90", journal=Journal(path, "here"))
        assert second.asked == []
        assert choice.best.microseconds == 10
        elsewhere = gauge()
        choose_measured([self.task()], elsewhere, architecture="sm_90", journal=Journal(path, "another GPU"))
        assert len(elsewhere.asked) == len(first.asked)

    def test_a_torn_line_swallows_no_result(self, tmp_path):
        path = tmp_path / "journal"
        path.write_text('{"key": "cut o')
        Journal(path, "").write("a", microseconds=1.0, error=0.0, dropped="")
        Journal(path, "").write("b", microseconds=2.0, error=0.0, dropped="")
        assert Journal(path, "").known.keys() == {"a", "b"}
        assert path.read_text().splitlines()[0] == '{"key": "cut o'
        assert len(path.read_text().splitlines()) == 3

    def test_what_ends_the_process_is_begun_twice_at_most(self, tmp_path):
        """The process dies at the vendor's product, without a word, as often as that is tried."""
        path = tmp_path / "journal"
        script = f"""
import os, sys
from pathlib import Path
from tests.tuning import test_tuner as t
class Deadly(t.StandIn):
    def microseconds(self, task, config):
        if config["vendor"]:
            os._exit(139)
        return 10.0
task = t.named(t.tasks_for(t.QWEN2), "mlp.up")
kept = [t.Candidate(fields) for fields in t.candidates(task, "sm_90", measured=True) if fields["vendor"]]
t.tuner._compile = lambda *arguments, **options: {{task: [t.Candidate(t.default_fields(task, "sm_90")), *kept]}}
gauge = Deadly(None, None)
(choice,) = t.choose_measured([task], gauge, architecture="sm_90", journal=t.Journal(Path({str(path)!r}), ""))
print([each.dropped for each in choice.dropped], choice.best.config["vendor"])
"""
        root = Path(__file__).parents[2]
        runs = [
            subprocess.run(
                [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300, check=False
            )
            for _ in range(3)
        ]
        assert [each.returncode for each in runs] == [139, 139, 0], runs[-1].stderr
        assert runs[-1].stdout.strip() == "['ended the process 2 times, or hung until it was ended'] False"

    def test_an_interruption_is_no_configurations_fault(self, compiler, tmp_path):
        def times(task: Task, config: Mapping[str, Any]) -> float:
            if config["vendor"] and next(interruptions, None) is not None:
                raise KeyboardInterrupt
            return 10.0

        path, interruptions = tmp_path / "journal", iter(range(3))
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                choose_measured([self.task()], gauge(times), architecture="sm_90", journal=Journal(path, ""))
        (choice,) = choose_measured([self.task()], gauge(times), architecture="sm_90", journal=Journal(path, ""))
        assert not any(each.config["vendor"] for each in choice.dropped)

    def test_deadline_keeps_what_is_done(self, compiler):
        slow = gauge(lambda task, config: time.sleep(0.05) or 10.0)
        tasks = tasks_for(QWEN2)
        choices = choose_measured(tasks, slow, architecture="sm_90", deadline=time.monotonic() + 1.5)
        assert 0 < len(choices) < len(tasks)

    def test_sizes_agree_by_their_times(self, compiler):
        tasks = [task for task in tasks_for(QWEN2, PATCHES) if task.kernel == "attention"]

        def times(task: Task, config: Mapping[str, Any]) -> float:
            # Long segments, which count most, like 64 keys; short ones 128.
            return task.fact("longest") * (
                1.0 if (config["block_keys"] == 64) == (task.fact("longest") > 4096) else 2.0
            )

        choices = choose_measured(tasks, gauge(times), architecture="sm_90")
        assert len(choices) == len(PATCHES)
        assert {choice.best.config["block_keys"] for choice in choices} == {64}

    def test_what_cannot_be_captured_where_others_can_is_dropped(self, monkeypatch):
        """Its time would have the start of a launch in it, and be ranked against times that have not."""

        def time(call: Any, *, graph: bool, **_: Any) -> Timing:
            return Timing((1e-6,), "graph" if graph else "events")

        (task,) = [each for each in small_tasks(QWEN2, "float32") if each.node == "mlp.up"]
        fields = default_fields(task, "interpreter")
        monkeypatch.setattr(tuner, "time_on_device", time)
        monkeypatch.setattr(tuner, "can_capture", lambda _: True)
        assert Gauge(torch.device("cpu")).microseconds(task, fields) == pytest.approx(1)
        monkeypatch.setattr(tuner, "time_on_device", lambda *_, **__: Timing((1e-6,), "events"))
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            Gauge(torch.device("cpu")).microseconds(task, fields)
        monkeypatch.setattr(tuner, "can_capture", lambda _: False)
        assert Gauge(torch.device("cpu")).microseconds(task, fields) == pytest.approx(1)

    def test_the_real_gauge(self, monkeypatch, kernel_device):
        """In the interpreter: a kernel that is right, one that is wrong, and one that is not the same twice."""
        (task,) = [each for each in small_tasks(QWEN2, "float32") if each.node == "mlp.up"]
        fields = default_fields(task, configs.architecture(kernel_device))
        real = Gauge(kernel_device)
        monkeypatch.setattr(tuner, "REPEATS", 2)
        error, wrong = real.error(task, fields)
        assert error < 1e-5
        assert wrong == ""
        assert real.microseconds(task, fields) > 0

        def spoilt(*arguments: Any, **options: Any) -> Any:
            operation = prepare(*arguments, **options)

            def run(config: Mapping[str, Any]) -> torch.Tensor:
                out = operation.run(config)
                out[3] += spoil(out[3])
                return out

            return replace(operation, run=run)

        monkeypatch.setattr(tuner, "prepare", spoilt)
        spoil = torch.ones_like
        assert real.error(task, fields)[1].startswith("wrong by ")
        spoil = lambda row: torch.rand_like(row) * 1e-8  # noqa: E731
        assert real.error(task, fields)[1] == "two launches on the same rows differ"


def test_candidates_cost():
    assert Candidate({}).cost == math.inf
    assert Candidate({}, microseconds=3.0).cost == 3.0
    assert Candidate({}, microseconds=3.0, dropped="wrong").cost == math.inf


def test_published_tasks_are_those_of_every_family():
    tasks = published_tasks()
    assert {task.dtype for task in tasks} == {"bfloat16"}
    heads = {task.fact("head_dim") for task in tasks if task.kernel == "attention"}
    assert {64, 72, 80} <= heads
    assert json.dumps([[task.key, task.facts] for task in tasks])
