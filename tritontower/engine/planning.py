"""Memory of a forward pass, and the batch size that follows from it."""

from collections.abc import Iterable, Sequence

import torch

from tritontower.batch.packed_batch import expected_workload
from tritontower.config import TowerConfig
from tritontower.errors import UsageError, is_integer, shorten
from tritontower.graph.ir import Graph, Workload
from tritontower.graph.memory_plan import MemoryPlan, plan_memory
from tritontower.kernels.runtime.dispatch import backend_on

from .static_buffers import plan_static_buffers

BATCH_BYTES = 2**30
"""Default memory of a batch beside the weights.  A batch of this size keeps any device busy; a larger one delays the
first result and leaves preprocessing nothing to overlap with."""


def plan_forward(
    graph: Graph,
    config: TowerConfig,
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    *,
    pixels: torch.dtype = torch.float32,
) -> MemoryPlan:
    """Plans the memory that one forward pass allocates beside the weights.

    On a GPU the plan is that of the rounded batch size, whose buffers and captured graph many batch sizes share.
    """
    if device.type != "cuda":
        cpu_dtype = dtype if backend_on(device) == "reference" else None
        return plan_memory(graph, workload, dtype.itemsize, cpu_dtype=cpu_dtype)
    tile_rows = config.longest_segment
    return plan_static_buffers(
        graph,
        workload,
        dtype.itemsize,
        rows_per_token=config.rows_per_token,
        tile_rows=tile_rows if tile_rows is not None and workload.patches == workload.tiles * tile_rows else None,
        pixels=pixels,
    )


def patches_per_batch(plan: MemoryPlan, device: torch.device) -> int:
    """Returns the default number of patches of a batch: 1 GiB, or half of a GPU's free memory if that is less.

    ``plan`` is that of a sample batch.  Memory grows in proportion to the patches, except for the workspace of torch's CPU
    operators, which has a fixed size and is left out.
    """
    budget = BATCH_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch's allocator has reserved and not handed out is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(budget, (free + unused) // 2)
    return max(1, budget * plan.workload.patches // (plan.peak_bytes - plan.workspace_bytes))


def parse_workload(config: TowerConfig, patches: int | Sequence[int] | Workload) -> Workload:
    """Returns the workload of a batch of still images, given the number of patches of each."""
    if isinstance(patches, Workload):
        return patches
    counts = list(patches) if isinstance(patches, Iterable) and not isinstance(patches, str) else [patches]
    if not all(map(is_integer, counts)):
        raise UsageError(f"patches must be an integer or a list of integers, got {shorten(patches)}")
    counts = [int(count) for count in counts]
    unit = config.num_patches or config.rows_per_token
    if any(count < 0 or count % unit for count in counts):
        reason = "patches of one token" if config.num_patches is None else "patches of one tile"
        raise UsageError(f"patches must be multiples of {unit}, the {reason}, got {counts}")
    return expected_workload(config, counts)
