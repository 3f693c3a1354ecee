"""Tasks, table entries and stand-ins for compilers and GPUs, for the tests of tuning."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tritontower.engine.tuned_tables import Identity, source_digest
from tritontower.kernels.runtime._triton import triton
from tritontower.models.common.family import FamilySummary, read_summary
from tritontower.models.common.registry import read_family
from tritontower.tuning.candidate import Candidate
from tritontower.tuning.compile.aot_compile import CompileResult, Order
from tritontower.tuning.compile.compiled_kernel import CompiledKernel
from tritontower.tuning.table_writer import table_key
from tritontower.tuning.tasks import Task, list_tasks
from tritontower.tuning.tuner import Gauge, compile_tasks

QWEN2, QWEN2_5, GEMMA3 = (read_summary(name) for name in ("qwen2_vl", "qwen2_5_vl", "gemma3"))

GPU = Identity("NVIDIA Test 1", "sm_90", "9.0", 132)
LINEAR = {"columns": 5120, "inner": 1280, "activation": None, "residual": False}
CONFIG = {"block_rows": 128, "block_columns": 128, "block_inner": 64, "group_rows": 8, "num_warps": 4, "num_stages": 3}


def make_entry(rows: int = 4096, *, warps: int = 4, kernel: str = "gemm.linear", **changes: Any) -> dict[str, Any]:
    """Returns an entry of a table."""
    return {
        "kernel": kernel,
        "source": source_digest(kernel),
        "triton": str(triton.__version__),
        "dtype": "bfloat16",
        "constants": LINEAR,
        "sizes": {"rows": rows},
        "config": {**CONFIG, "num_warps": warps},
        "microseconds": 12.5,
        "runner_up": {"config": CONFIG, "microseconds": 13.0},
        "verified": 0.002,
        "date": "2026-11-21",
        **changes,
    }


def make_table(*entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table of :data:`GPU`."""
    return {"schema": 1, "key": table_key(GPU), "entries": list(entries)}


def tasks_for(
    summary: FamilySummary, patches: Sequence[int] = (1024,), dtype: torch.dtype = torch.bfloat16
) -> list[Task]:
    """Lists the tasks of a published model."""
    return list_tasks(read_family(summary.reader).config, patches, dtype)


def find_task(tasks: Sequence[Task], node: str) -> Task:
    """Returns the only task of a node."""
    (found,) = (task for task in tasks if task.node == node)
    return found


def small_tasks(summary: FamilySummary, dtype: str) -> list[Task]:
    """Lists one small task for each kind of launch of a tower, for the interpreter."""
    kinds: dict[Any, Task] = {}
    for task in tasks_for(summary, (64,), getattr(torch, dtype)):
        constants, details = dict(task.constants), dict(task.details)
        kind = (task.kernel, *(value for value in constants.values() if not isinstance(value, int)))
        for name in {"columns", "inner", "width"} & constants.keys():
            constants[name] = min(constants[name], 96)
        if task.kernel == "gemm.qkv_projection":
            constants["columns"] = 3 * 2 * (details["padded_head_dim"] or constants["head_dim"])
        details |= {name: value for name, value in {"heads": 2, "rows": 70}.items() if name in details}
        sizes = dict.fromkeys(dict(task.sizes), 70)
        if constants.get("bounded"):
            sizes, constants["bounded"] = {"longest": 64}, 64
        parts = [tuple(sorted(part.items())) for part in (constants, sizes, details)]
        kinds.setdefault(kind, replace(task, constants=parts[0], sizes=parts[1], details=parts[2]))
    return list(kinds.values())


def compiled(**changes: Any) -> CompiledKernel:
    """Returns a compiled kernel that breaks no rule on sm_90 and sm_100."""
    values: dict[str, Any] = {
        "kernel": "_k", "num_warps": 4, "threads": 128, "registers": 128, "spills": 0, "stack": 0,
        "shared_memory": 65536, "occupancy": 2, "tensor_core": {"HGMMA": 8, "UTCHMMA": 8}, "instructions": 600,
        "loop_instructions": 100,
    }  # fmt: skip
    return CompiledKernel(**{**values, **changes})


def stand_in_compiler(
    spills: Callable[[Mapping[str, Any]], bool],
) -> Callable[..., Iterator[tuple[int, CompileResult]]]:
    """Returns a replacement of ``compile_orders`` that answers at once; ``spills`` selects configurations."""

    def compile_orders(orders: Sequence[Order], **options: Any) -> Iterator[tuple[int, CompileResult]]:
        for index, order in enumerate(orders):
            values = dict(order.config)
            yield index, CompileResult((compiled(num_warps=values["num_warps"], spills=9 * spills(values)),))

    return compile_orders


class StandInGauge(Gauge):
    """A GPU that answers at once: ``times`` of a task and configuration, and ``wrong`` of a configuration."""

    def __init__(
        self,
        times: Callable[[Task, Mapping[str, Any]], float] = lambda task, config: 10.0,
        wrong: Callable[[Mapping[str, Any]], str] = lambda config: "",
    ) -> None:
        super().__init__(torch.device("cpu"))
        self.times, self.wrong = times, wrong
        self.timed: list[dict[str, Any]] = []

    def error(self, task: Task, config: Mapping[str, Any]) -> tuple[float, str]:
        """Returns an error of 0.002."""
        return 0.002, self.wrong(config)

    def microseconds(self, task: Task, config: Mapping[str, Any]) -> float:
        """Returns the given time."""
        self.timed.append(dict(config))
        return float(self.times(task, config))


def compile_one_task(cache: Path) -> list[Candidate]:
    """Compiles three configurations of one task for real, in a process that may be killed."""
    task = find_task(tasks_for(QWEN2), "attention_output")
    return compile_tasks([task], "sm_80", cache=cache, compiled=4)[task]
