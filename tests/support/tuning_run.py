"""A small static tuning run, for a process of its own that may be killed."""

from pathlib import Path

import torch

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.models import qwen2_vl
from tritontower.models.common.registry import read_family
from tritontower.tuning.tasks import tasks_of
from tritontower.tuning.tuner import Choice, choose_static

__all__ = ["run"]


def run(cache: Path) -> list[Choice]:
    """Tunes one product of Qwen2-VL for sm_80, three configurations a round."""
    (summary,) = qwen2_vl.SUMMARIES
    tasks = tasks_of(read_family(ConfigReader(summary.example)).config, (1024,), torch.bfloat16)
    chosen = [task for task in tasks if task.node == "attention_output"]
    return choose_static(chosen, "sm_80", cache=cache, compiled=2)
