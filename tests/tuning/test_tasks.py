"""Tuning tasks, their search space, and their operations."""

import math
from typing import Any

import pytest
import torch
from support.tuning import GEMMA3, QWEN2, QWEN2_5, find_task, small_tasks, tasks_for

from tritontower import VisionTower
from tritontower.demo.random_checkpoint import write_random_checkpoint
from tritontower.kernels.attention import attention
from tritontower.kernels.gemm import linear, patch_projection, qkv_projection
from tritontower.kernels.rowwise import norm
from tritontower.kernels.runtime import config as configs
from tritontower.kernels.runtime.config import ARCHITECTURES, SHARED_MEMORY_LIMIT
from tritontower.kernels.runtime.registry import SAME_FOR_ALL_SIZES, dtype_name, make_config
from tritontower.models.common.family import read_summary
from tritontower.tuning.operations import CONFIGS, prepare
from tritontower.tuning.search_space import default_values, list_candidates, shared_fields
from tritontower.tuning.tasks import list_tasks
from tritontower.tuning.tuner import ERROR_LIMIT, distance

pytest.importorskip("triton", reason="tuning needs Triton, which ships for Linux only")


SMALL = {"depth": 2, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 96}


class TestTasks:
    def test_tasks_of_qwen2_vl(self):
        tasks = tasks_for(QWEN2)
        assert find_task(tasks, "attention").launches == 32
        assert dict(find_task(tasks, "attention").sizes) == {"longest": 1024}
        assert {task.kernel for task in tasks} == set(CONFIGS)
        up = find_task(tasks, "mlp.up")
        assert dict(up.constants) == {"columns": 5120, "inner": 1280, "activation": "quick_gelu", "residual": False}
        assert up.flops == 2 * 1024 * 5120 * 1280
        assert find_task(tasks, "attention").flops == 4 * 1024**2 * 1280
        assert dict(find_task(tasks, "projector.1").sizes) == {"rows": 256}
        assert len({task.key for task in tasks}) == len(tasks)

    def test_windows_and_gates(self):
        tasks = tasks_for(QWEN2_5, (4096,))
        bounds = {task.get("bounded"): task for task in tasks if task.kernel == "attention.attention"}
        assert {bound: task.launches for bound, task in bounds.items()} == {0: 4, 64: 28}
        assert dict(bounds[64].sizes) == {"longest": 64}
        gated = [task for task in tasks if task.is_gated]
        assert [task.get("activation") for task in gated] == ["silu_gated_interleaved"]
        assert gated[0].flops == 4 * 4096 * gated[0].get("columns") * gated[0].get("inner")
        assert not any(values.get("vendor") for values in list_candidates(gated[0], "sm_90"))

    def test_padded_heads_and_a_fixed_image_size(self):
        tasks = tasks_for(GEMMA3, (100, 4096, 5000))
        task = find_task(tasks, "attention")
        assert dict(task.constants) == {"head_dim": 72, "padded": True, "bounded": 4096}
        assert (task.get("width"), task.get("queries_scaled")) == (80, True)
        projection = find_task(tasks, "qkv")
        assert projection.get("query_scale") * math.log(2) == pytest.approx(72**-0.5)
        assert not any(values.get("vendor") for values in list_candidates(projection, "sm_90"))
        assert {task.get("rows") for task in tasks if task.node == "patch_projection"} == {4096}

    def test_sizes_in_one_bucket_are_one_task(self):
        assert len(tasks_for(QWEN2, (1024, 1030))) == len(tasks_for(QWEN2, (1024,)))
        assert len(tasks_for(QWEN2, (1024, 2048))) == 2 * len(tasks_for(QWEN2, (1024,)))

    @pytest.mark.parametrize(
        ("name", "small"),
        [
            ("qwen2_vl", {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 96}),
            ("qwen2_5_vl", {**SMALL, "intermediate_size": 100, "fullatt_block_indexes": [1]}),
            ("qwen3_vl", {**SMALL, "intermediate_size": 96, "deepstack_visual_indexes": [0]}),
        ],
    )
    def test_tasks_are_the_lookups_of_a_tower(self, name, small, tmp_path, monkeypatch, kernel_device):
        summary = read_summary(name)
        example = {**summary.example, "vision_config": {**summary.example["vision_config"], **small}}
        folder = write_random_checkpoint(tmp_path / "model", example, summary.processor, dtype=torch.float32)
        tower = VisionTower.from_pretrained(folder, device=kernel_device)
        asked: dict[Any, set[tuple[str, ...]]] = {}

        def lookup(kind: type, kernel: str, device: Any, dtype: Any, constants: Any, sizes: Any) -> None:
            group = (kernel, dtype_name(dtype), tuple(sorted(constants.items())))
            asked.setdefault(group, set()).add(tuple(sizes))

        for module in (attention, linear, norm, patch_projection, qkv_projection):
            monkeypatch.setattr(module, "lookup", lookup)
        tower.encode([torch.rand(56, 56, 3).mul(255).to(torch.uint8).numpy()])
        tasks = list_tasks(tower.config, (16,), torch.float32)
        assert asked == {task.group: {tuple(name for name, _ in task.sizes)} for task in tasks}


class TestSearchSpace:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_candidates_are_configurations_with_the_default_first(self, architecture, dtype):
        assert {kernel for kernel in CONFIGS if shared_fields(kernel, architecture)} == set(SAME_FOR_ALL_SIZES)
        for task in tasks_for(QWEN2, (64, 4096), dtype) + tasks_for(GEMMA3, (4096,), dtype):
            default, found = default_values(task, architecture), list_candidates(task, architecture)
            assert found[0] == default
            assert all(make_config(CONFIGS[task.kernel], values) is not None for values in found), task.title
            assert all(values.keys() == default.keys() for values in found)
            assert len({tuple(sorted(values.items())) for values in found}) == len(found)
            for values in found[1:]:
                if "block_inner" in values and not values["vendor"]:
                    rows = values["block_rows"] + values["block_columns"]
                    memory = rows * values["block_inner"] * values["num_stages"] * dtype.itemsize
                    assert memory <= SHARED_MEMORY_LIMIT[architecture]

    def test_only_linears_may_use_the_vendors_gemm(self):
        for task in tasks_for(QWEN2):
            found = list_candidates(task, "sm_90")
            assert any(values.get("vendor") for values in found) == (task.kernel == "gemm.linear")

    def test_k_is_split_for_few_rows_only(self):
        few, many = (find_task(tasks_for(QWEN2, (patches,)), "mlp.down") for patches in (64, 16384))
        assert {values["split"] for values in list_candidates(few, "sm_90")} > {1, 2, 4}
        assert {values["split"] for values in list_candidates(many, "sm_90")} == {1}

    @pytest.mark.parametrize(("patches", "rows"), [(16384, (128, 256)), (64, (64,))])
    def test_large_tiles_precede_small_ones_for_many_rows(self, patches, rows):
        found = list_candidates(find_task(tasks_for(QWEN2, (patches,)), "mlp.up"), "sm_90")
        assert found[2]["block_rows"] in rows


class TestOperations:
    @pytest.mark.parametrize(
        ("summary", "dtype"),
        [(QWEN2, "bfloat16"), (QWEN2_5, "float32"), (GEMMA3, "bfloat16")],
        ids=["qwen2_vl", "qwen2_5_vl", "gemma3"],
    )
    def test_default_configurations_pass_the_check(self, summary, dtype, kernel_device):
        for task in small_tasks(summary, dtype):
            for hard in (False, True) if task.kernel == "attention.attention" else (False,):
                operation = prepare(task, kernel_device, hard=hard)
                found = operation.run(default_values(task, configs.architecture(kernel_device)))
                error, worst = distance(found, operation.expected())
                assert error < ERROR_LIMIT[dtype], (task.title, hard)
                assert worst < 5 * ERROR_LIMIT[dtype], (task.title, hard)

    def test_values_of_another_kernel_are_rejected(self):
        operation = prepare(small_tasks(QWEN2, "float32")[0], torch.device("cpu"))
        with pytest.raises(ValueError, match="values must be the fields of a configuration"):
            operation.run({"nonsense": 1})

    @pytest.mark.parametrize("spoil", ["row", "nan", "all"])
    def test_distance_finds_wrong_results(self, spoil):
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
        assert worst > 5 * ERROR_LIMIT["bfloat16"] or error > ERROR_LIMIT["bfloat16"]
