"""Times the forms of one kernel against each other: attention variants and GEMM configurations, on a GPU.

    python -m bench.variants attention --output attention.json
    python -m bench.variants linear --grid small

Each case is checked against fp64 before it is timed.  A configuration that the device would replace by another one is
skipped, with the reason.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tritontower.benchmarks.cases import Case, cases
from tritontower.benchmarks.kernels import measure, start_report, table
from tritontower.benchmarks.shapes import GRIDS
from tritontower.cli.options import output_file
from tritontower.devices import parse_device
from tritontower.kernels.attention import fixed_max
from tritontower.kernels.attention.common import FlashAttentionConfig
from tritontower.kernels.gemm.linear_config import default_config as default_linear_config
from tritontower.kernels.gemm.vendor import can_use_vendor_gemm
from tritontower.kernels.runtime.config import architecture

Shape = tuple[int, int, int, int]
"""Query rows and keys of a block, warps, stages."""
SHAPES: Sequence[Shape] = ((128, 64, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3))
TILE_FIELDS = ("block_rows", "block_columns", "block_inner", "group_rows", "num_warps", "num_stages")
TILES = ((128, 128, 64, 8, 4, 3), (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (64, 128, 64, 8, 4, 4))


def attention_config(shape: Shape, variant: Any) -> FlashAttentionConfig:
    """The configuration of an attention variant."""
    queries, keys, warps, stages = shape
    return FlashAttentionConfig(
        block_queries=queries, block_keys=keys, num_warps=warps, num_stages=stages, variant=variant
    )


def replaced_because(case: Case, device: torch.device) -> str | None:
    """Returns why the device would run another attention variant; ``None`` if it runs the configured one."""
    here = architecture(device)
    if case.config.variant == "fixed" and here not in fixed_max.ARCHITECTURES:
        return f"the fixed softmax offset is not compiled for {here}"
    return None


def attention_variants(case: Case) -> Iterator[Case]:
    """The case in every variant that compiles without spills, for long images and for windows."""
    lengths, head_dim = case.sizes["lengths"], case.sizes["head_dim"]
    if list(lengths) not in ([4096], [16384]) and set(lengths) != {64}:
        return
    bounded = replace(case, sizes={**case.sizes, "length_bound": 64}) if max(lengths) <= 64 else case
    shapes = [*SHAPES, *([(128, 128, 4, 2)] if head_dim <= 64 else [])]
    chosen = [(shape, variant) for shape in shapes for variant in ("online", "fixed")]
    chosen += [((64, 64, 4, 1), "single_block")] if max(lengths) <= 64 else []
    for shape, variant in chosen:
        label = "{4} {0} × {1}, {2} warps, {3} stages".format(*shape, variant)
        yield bounded.launched(attention_config(shape, variant), label)


def linear_variants(case: Case, device: torch.device) -> Iterator[Case]:
    """The case by pointers, by descriptors, by the vendor's GEMM, and with other tiles."""
    sizes, here = case.sizes, architecture(device)
    shape = sizes["rows"], sizes["columns"], sizes["inner"]
    base = default_linear_config(*shape, dtype=case.dtype, activation=sizes["activation"], architecture=here)
    yield case.launched(replace(base, operands="pointers", vendor=False), "pointers")
    if here in ("sm_90", "sm_100", "interpreter"):
        yield case.launched(replace(base, operands="descriptors", vendor=False), "descriptors")
    if can_use_vendor_gemm(torch.empty(0, dtype=case.dtype), sizes["activation"]):
        yield case.launched(replace(base, vendor=True), "vendor")
    if sizes["activation"] == "silu_gated":
        return
    for tile in TILES:
        config = replace(base, **dict(zip(TILE_FIELDS, tile, strict=True)), split=1, vendor=False, operands="pointers")
        yield case.launched(config, "{0} × {1} × {2}, {4} warps, {5} stages".format(*tile))


def main(words: Sequence[str] | None = None) -> int:
    """Times the cases as configured by default, then every variant; returns 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=("attention", "linear"))
    parser.add_argument("--grid", choices=GRIDS, default="gpu", help="sizes of the cases (default: gpu)")
    parser.add_argument("--most", type=int, metavar="N", help="at most so many cases")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write the report here, as JSON")
    arguments = parser.parse_args(words)
    device = parse_device(None)
    report, roofline = start_report(device, torch.bfloat16, arguments.output)
    found = list(cases(arguments.grid, torch.bfloat16, [arguments.kernel]))[: arguments.most]
    for case in found:
        report.add(measure(case, device, roofline))
    for case in found:
        several = attention_variants(case) if case.kernel == "attention" else linear_variants(case, device)
        for variant in several:
            reason = replaced_because(variant, device) if case.kernel == "attention" else None
            row = {"kernel": case.kernel, "case": variant.label, "status": "skipped", "reason": reason}
            report.add(row if reason else measure(variant, device, roofline, baselines=False))
    print(table(report.finish()))
    return int(any(row["status"] == "failed" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
