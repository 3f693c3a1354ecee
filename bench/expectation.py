"""States what a forward pass of Qwen2-VL on an H200 would take by FLOPs, bytes and wave quantization alone.

    python -m bench.expectation

This is arithmetic over the layer graph and the chip's published limits, not a measurement: nothing is launched.  A node takes
as long as its FLOPs at the peak, or its bytes at the full bandwidth, whichever is longer.  With *waves*, the tiles of the
default configurations run in rounds of one per multiprocessor; the last round takes as long as a full one.
"""

from collections.abc import Iterator

import torch

from tritontower.benchmarks.roofline import published_roofline
from tritontower.graph.builder import build
from tritontower.graph.cost import estimate_cost, list_matmuls
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.graph.ir import Graph, Node, Workload
from tritontower.kernels.attention.attention import default_config as attention_config
from tritontower.kernels.gemm.linear_config import default_config as linear_config
from tritontower.kernels.runtime.checks import ceil_div
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family
from tritontower.text_table import text_table

PATCHES = (256, 1024, 4096, 16384)
MULTIPROCESSORS = 132


def list_tiles(graph: Graph, node: Node, workload: Workload) -> Iterator[tuple[int, int]]:
    """Yields the number of tiles of each matmul of a node, and the FLOPs of a tile."""
    dtype, chip = torch.bfloat16, "sm_90"
    if node.kind == "attention":
        heads, head_dim = int(node.attributes["heads"]), int(node.attributes["head_dim"])
        rows = attention_config(head_dim, dtype, chip, longest=workload.patches).block_queries
        yield heads * ceil_div(workload.patches, rows), 4 * rows * workload.patches * head_dim
    for rows, columns, inner in list_matmuls(graph, node, workload):
        config = linear_config(
            rows, columns, inner, dtype=dtype, activation=node.attributes.get("activation"), architecture=chip
        )
        tiles = ceil_div(rows, config.block_rows) * ceil_div(columns, config.block_columns) * config.split
        yield tiles, 2 * config.block_rows * config.block_columns * inner // config.split


def main() -> None:
    """Prints the table."""
    roofline = published_roofline("NVIDIA H200")
    assert roofline is not None
    graph = fuse(build(read_family(read_summary("qwen2_vl").reader).config), select_passes(torch.device("cuda")))
    graph, rows = fold_still_images(graph), []
    for patches in PATCHES:
        workload = Workload(patches, patches // 4, scores=patches**2)
        ideal = waves = flops = 0.0
        for node in graph.nodes:
            cost = estimate_cost(graph, node, workload, itemsize=2)
            moved, computed = cost.bytes / roofline.bytes, cost.flops / roofline.flops
            rounds = [ceil_div(count, MULTIPROCESSORS) * each for count, each in list_tiles(graph, node, workload)]
            ideal += max(moved, computed)
            waves += max(moved, sum(rounds) * MULTIPROCESSORS / roofline.flops)
            flops += cost.flops
        cells = (f"{flops / 1e12:.2f}", f"{1e3 * ideal:.2f}", f"{1e3 * waves:.2f}")
        rows.append((f"{patches:,}", *cells, f"{100 * flops / roofline.flops / waves:.0f} %"))
    columns = ("patches", "TFLOP", "FLOPs or bytes, ms", "with waves, ms", "of the peak")
    print(text_table("Qwen2-VL, bfloat16, H200: computed, never measured", columns, rows))


if __name__ == "__main__":
    main()
