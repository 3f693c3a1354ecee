"""Makes the tables that come with the package: predicted configurations of the published towers, for each architecture.

``python -m tritontower.tuning.build_tables`` writes ``kernels/tuned/sm_80.json`` and its variants; it needs no GPU, and goes on where it
was when it is started again.  It has to be run when a kernel's device code or launcher changes, because entries count only
for the source that they were found for; ``tests/engine/test_tuned_tables.py`` says when that is.

What is chosen in no size differently from the default is left out.  Tables measured on a GPU lie beside these; they are
made with ``tritontower tune MODEL --output kernels/tuned`` on that GPU.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig
from tritontower.kernels.runtime import tables
from tritontower.models import gemma3, llava, qwen2_5_vl, qwen2_vl, qwen3_vl
from tritontower.models.common.registry import MISTRAL_FORMAT, family_files, read_family

from .compile.aot_compile import cache_folder
from .table_writer import entries_of, replace_table, static_identity, table_key
from .tasks import PATCHES, Task, tasks_of
from .tuner import Choice, choose_static

__all__ = ["ARCHITECTURES", "main", "published_tasks", "published_towers"]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")

_SMALL_QWEN3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}

_OTHER_SIZES: Sequence[tuple[Any, Mapping[str, Any]]] = (
    *((qwen2_vl, {"hidden_size": width, "vision_config": {"hidden_size": width}}) for width in (1536, 3584, 8192)),
    *(
        (qwen2_5_vl, {"vision_config": {"intermediate_size": hidden, "out_hidden_size": width}})
        for width, hidden in ((2048, 3420), (3584, 3420), (5120, 3456), (8192, 3456))
    ),
    *(
        (qwen3_vl, {"text_config": {"hidden_size": width}, "vision_config": {"out_hidden_size": width, **vision}})
        for width, vision in ((2048, _SMALL_QWEN3), (2560, _SMALL_QWEN3), (2048, {}), (4096, {}), (5120, {}))
    ),
    *((gemma3, {"text_config": {"hidden_size": width}}) for width in (2560, 3840, 5376)),
    (llava, {"text_config": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}}),
)
"""Published models of other sizes than their family's example: family file, what differs."""


def published_towers() -> list[TowerConfig]:
    """The towers of every family's example, and of the other sizes that are published."""
    examples = [
        summary.example for file in dict.fromkeys(family_files().values()) for summary in file.SUMMARIES
    ]  # fmt: skip
    for file, changes in _OTHER_SIZES:
        example = file.SUMMARIES[0].example
        merged = {
            name: {**example.get(name, {}), **value} if isinstance(value, Mapping) else value
            for name, value in changes.items()
        }
        examples.append({**example, **merged})
    sources = ["config.json" if "model_type" in example else MISTRAL_FORMAT for example in examples]
    return [
        read_family(ConfigReader(example, source)).config for example, source in zip(examples, sources, strict=True)
    ]


def published_tasks() -> list[Task]:
    """Every task of a published tower in bf16, once."""
    found: dict[Any, Task] = {}
    for config in published_towers():
        for task in tasks_of(config, PATCHES, torch.bfloat16):
            found.setdefault(task.key, task)
    return list(found.values())


def _worth_telling(choices: Sequence[Choice]) -> list[Choice]:
    """The choices of the groups in which some size takes another configuration than the default."""
    differing = {each.task.group for each in choices if each.best.identity != each.default.identity}
    return [each for each in choices if each.task.group in differing]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tritontower.tuning.build_tables",
        description="Predict the configurations of the published towers and write the tables that come with the package.",
        epilog="example: python -m tritontower.tuning.build_tables --architecture sm_90",
    )
    parser.add_argument(
        "--architecture", action="append", choices=ARCHITECTURES, help="may be repeated; default: all four"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compiler processes at once")
    parser.add_argument(
        "--compiled", type=int, default=4, help="configurations of a task that are compiled, beside the default"
    )
    parser.add_argument("--output", type=Path, default=tables.packaged_folder().resolve(), help="the tables' folder")
    options = parser.parse_args(arguments)
    tasks = published_tasks()
    for architecture in options.architecture or ARCHITECTURES:
        start = time.monotonic()

        def progress(what: str, done: int, total: int, name: str = architecture) -> None:
            if done % 25 == 0 or done == total:
                print(f"{name}: {what} {done} of {total}", file=sys.stderr, flush=True)

        how: dict[str, Any] = {"workers": options.workers, "compiled": options.compiled, "progress": progress}
        choices = choose_static(tasks, architecture, cache=cache_folder(), **how)
        told = _worth_telling(choices)
        path = options.output / tables.table_name(architecture)
        replace_table(path, table_key(static_identity(architecture)), entries_of(told))
        print(f"{path}: {len(told)} entries for {len(tasks)} tasks, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
