"""Parity and memory of the Qwen2-VL-2B tower at its published size, with random weights that are kept."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import noise

from tritontower import VisionTower
from tritontower.benchmarks.subprocesses import measure_apart
from tritontower.demo.checkpoint import demonstration_checkpoint
from tritontower.parity.parity import compare, compare_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES = [noise(210, 250, 0), noise(300, 100, 1), noise(56, 56, 2)]
MEMORY_ALLOWANCE = 300e6
"""Bytes that a process may allocate beyond weights and memory plan, for the libraries' own workspaces."""


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return demonstration_checkpoint()


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> None:
    torch.set_num_threads(2)


def test_fp32_agrees_with_transformers(checkpoint: Path) -> None:
    tower = VisionTower.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)
    batch = tower.preprocess(IMAGES)
    parity = compare(tower, batch)
    assert parity.embeddings.error <= 1e-5, parity
    assert parity.worst_image <= 1e-5, parity


def test_bf16_error_is_within_the_limit(checkpoint: Path) -> None:
    tower = VisionTower.from_pretrained(checkpoint, device="cpu")
    assert tower.dtype == torch.bfloat16
    parity = compare(tower, tower.preprocess(IMAGES))
    assert parity.passed, parity
    # Every block adds rounding errors; the first is near that of a single bf16 store.
    assert next(line.error for line in compare_nodes(tower, tower.preprocess(IMAGES[2]))) <= 5e-3


@pytest.mark.parametrize("patches", [1024, 4096])
def test_memory_stays_within_weights_and_plan(checkpoint: Path, patches: int) -> None:
    memory = measure_apart("memory", folder=str(checkpoint), dtype="bfloat16", device="cpu", patches=patches)
    assert memory["growth_bytes"] <= memory["weights_bytes"] + memory["plan_bytes"] + MEMORY_ALLOWANCE, memory
