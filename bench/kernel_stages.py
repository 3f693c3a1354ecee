"""What a campaign measures of single kernels on a GPU; see :mod:`bench.campaign`."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tritontower.benchmarks.cases import Case, Grid, cases
from tritontower.benchmarks.kernels import measure
from tritontower.benchmarks.measuring import time_on_device
from tritontower.benchmarks.roofline import Roofline, measured_roofline, published_roofline
from tritontower.kernels.attention import fixed_max, warp_specialized
from tritontower.kernels.attention.attention import FlashAttentionConfig
from tritontower.kernels.gemm.linear import LinearConfig
from tritontower.kernels.gemm.linear import default_config as default_linear_config
from tritontower.kernels.gemm.vendor import can_use_vendor_gemm
from tritontower.kernels.runtime.config import architecture

from .dot16 import SHAPES, measure_dot
from .runner import Item, Row, Setting

__all__ = [
    "attention_fields",
    "attention_items",
    "dot_items",
    "falls_back",
    "gemm_items",
    "peak_items",
    "rope_items",
]


def _grid(setting: Setting) -> Grid:
    return "small" if setting.dry else "gpu"


def _yardstick(setting: Setting) -> Roofline:
    """The maker's figures; today's for a device that nobody has published any of."""
    if setting.dry:
        return Roofline(1e12, 1e11, "none: a dry run")
    known = published_roofline(torch.cuda.get_device_name(setting.device))
    return known or measured_roofline(setting.device, torch.bfloat16)


# -- peak -------------------------------------------------------------------------------------------------------------


def peak_items(setting: Setting) -> Iterator[Item]:
    """What the vendor's product, a copy and a launch take today."""
    device = setting.device

    def product(side: int, dtype: torch.dtype) -> Row:
        small = 64 if setting.dry else side
        found = measured_roofline(device, dtype, side=small, copied_bytes=2**20 if setting.dry else 2 * 2**30)
        return {"status": "ok", "tflops": found.flops / 1e12, "gigabytes_per_second": found.bytes / 1e9}

    def upload(megabytes: int) -> Row:
        size = 2**10 if setting.dry else megabytes * 2**20
        source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.empty(size, dtype=torch.uint8, device=device)
        timing = time_on_device(lambda: target.copy_(source, non_blocking=True), device=device, graph=False)
        return {"status": "ok", "seconds": timing.median, "gigabytes_per_second": size / timing.median / 1e9}

    def launch() -> Row:
        rows = torch.zeros(1, device=device)
        count, start = 1000, time.perf_counter()
        for _ in range(count):
            rows.add_(1)
        host = (time.perf_counter() - start) / count
        return {"status": "ok", "seconds": host}

    for side in (8192, 4096, 16384):
        yield f"product of {side}³, bfloat16", partial(product, side, torch.bfloat16)
    yield "product of 8192³, float16", partial(product, 8192, torch.float16)
    for megabytes in (4, 64, 256):
        yield f"copy of {megabytes} MiB to the device", partial(upload, megabytes)
    yield "launch of one small kernel, on the host", launch


# -- kernels ----------------------------------------------------------------------------------------------------------


def _measure(case: Case, setting: Setting, roofline: Roofline, *, rivals: bool = True) -> Row:
    budget = 0.001 if setting.dry else 0.2
    return measure(case, setting.device, roofline, rivals=rivals, budget_seconds=budget)


def _attention_variants(head_dim: int, longest: int) -> Iterator[dict[str, Any]]:
    """What may win at this head size: the shapes that compile without spills, in every variant that there is."""
    shapes = [(128, 64, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3)]
    if head_dim <= 64:
        shapes.append((128, 128, 4, 2))
    for shape in shapes:
        for variant in ("online", "fixed"):
            yield attention_fields(shape, variant)
    for shape in ((128, 128, 4, 2), (128, 64, 4, 2), (128, 128, 4, 3)):
        yield attention_fields(shape, "specialized")
    if longest <= 64:
        yield attention_fields((64, 64, 4, 1), "single_block")


def attention_fields(shape: tuple[int, int, int, int], variant: str) -> dict[str, Any]:
    """The fields of a configuration: query rows and keys of a block, warps, stages; and the variant."""
    queries, keys, warps, stages = shape
    return {
        "block_queries": queries,
        "block_keys": keys,
        "num_warps": warps,
        "num_stages": stages,
        "variant": variant,
    }


def _measure_attention(case: Case, chosen: Mapping[str, Any], setting: Setting, roofline: Roofline) -> Row:
    # A configuration that refuses itself is a result of this item, not the end of the stage.
    launched = case.launched(FlashAttentionConfig(**chosen), _words(chosen))
    if why := falls_back(launched, setting.device):
        return {"kernel": case.kernel, "case": launched.label, "status": "skipped", "reason": why}
    return _measure(launched, setting, roofline, rivals=False)


def falls_back(case: Case, device: torch.device) -> str | None:
    """Why another variant would run in the place of the configured one; ``None`` if none would."""
    here = architecture(device)
    config: FlashAttentionConfig = case.config
    if config.variant == "fixed" and here not in fixed_max.ARCHITECTURES:
        return f"the fixed stabilizer is not compiled for {here}"
    if config.variant != "specialized":
        return None
    heads, head_dim = case.sizes["heads"], case.sizes["head_dim"]
    width = case.sizes.get("padded", head_dim)
    q, k, v = torch.empty(1, 3, heads, width, dtype=case.dtype, device=device).unbind(1)
    return warp_specialized.find_obstacle(q, k, v, head_dim, config, here)


def _words(chosen: Mapping[str, Any]) -> str:
    return "{variant} {block_queries} × {block_keys}, {num_warps} warps, {num_stages} stages".format(**chosen)


def attention_items(setting: Setting) -> Iterator[Item]:
    """Attention as it is chosen, then in every variant."""
    roofline = _yardstick(setting)
    found = list(cases(_grid(setting), torch.bfloat16, ["attention"]))
    if setting.dry:
        found = found[:2]
    for case in found:
        yield f"{case.label}, as chosen", partial(_measure, case, setting, roofline)
    # Then every variant at the lengths that tell them apart, the longest first.
    telling = [case for case in found if setting.dry or _tells_apart(case.sizes["lengths"])]
    for case in sorted(telling, key=lambda case: -max(case.sizes["lengths"])):
        longest = max(case.sizes["lengths"])
        bounded = replace(case, sizes={**case.sizes, "length_bound": longest}) if longest <= 64 else case
        variants = list(_attention_variants(case.sizes["head_dim"], longest))
        for chosen in variants[:2] if setting.dry else variants:
            run = partial(_measure_attention, bounded, chosen, setting, roofline)
            yield f"{case.label}, {_words(chosen)}", run


def _tells_apart(lengths: Sequence[int]) -> bool:
    """One long image, or windows."""
    return list(lengths) in ([4096], [16384]) or set(lengths) == {64}


def dot_items(setting: Setting) -> Iterator[Item]:
    """Products of one tile on the tensor cores."""
    chosen = list(SHAPES.items())[:2] if setting.dry else list(SHAPES.items())
    for name, shape in chosen:
        for warps in (4,) if setting.dry else (4, 8):
            measure_it = partial(
                measure_dot,
                (16, 16, 16) if setting.dry else shape,
                setting.device,
                products=4 if setting.dry else 4096,
                num_warps=warps,
            )
            yield f"{name}, {warps} warps", measure_it


def _linear_variants(case: Case, device: torch.device) -> Iterator[tuple[str, LinearConfig]]:
    """Only those that run as they are called: what a launch cannot take, it quietly replaces."""
    sizes, here = case.sizes, architecture(device)
    base = default_linear_config(
        sizes["rows"],
        sizes["columns"],
        sizes["inner"],
        dtype=case.dtype,
        activation=sizes["activation"],
        residual=sizes["residual"],
        architecture=here,
    )
    yield "pointers", replace(base, operands="pointers", vendor=False)
    if here in ("sm_90", "sm_100", "interpreter"):
        yield "descriptors", replace(base, operands="descriptors", vendor=False)
    if can_use_vendor_gemm(torch.empty(0, dtype=case.dtype), sizes["activation"]):
        yield "vendor", replace(base, vendor=True)
    if sizes["activation"] != "silu_gated":
        for tile in ((128, 128, 64, 8, 4, 3), (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (64, 128, 64, 8, 4, 4)):
            rows, columns, inner, group, warps, stages = tile
            config = replace(
                base,
                block_rows=rows,
                block_columns=columns,
                block_inner=inner,
                group_rows=group,
                num_warps=warps,
                num_stages=stages,
                split=1,
                vendor=False,
                operands="pointers",
            )
            yield f"{rows} × {columns} × {inner}, {warps} warps, {stages} stages", config


def gemm_items(setting: Setting) -> Iterator[Item]:
    """Products as they are chosen, then in other configurations."""
    roofline = _yardstick(setting)
    found = list(cases(_grid(setting), torch.bfloat16, ["linear", "patch_projection", "projector"]))
    for case in found[:2] if setting.dry else found:
        yield f"{case.kernel}: {case.label}, as chosen", partial(_measure, case, setting, roofline)
    linears = [case for case in found if case.kernel == "linear"]
    for case in linears[:1] if setting.dry else linears:
        for name, config in itertools.islice(_linear_variants(case, setting.device), 3 if setting.dry else None):
            launched = case.launched(config, name)
            yield launched.label, partial(_measure, launched, setting, roofline, rivals=False)


def rope_items(setting: Setting) -> Iterator[Item]:
    """Rotation in the epilogue and by itself, norms, gathers."""
    roofline = _yardstick(setting)
    found = cases(_grid(setting), torch.bfloat16, ["qkv_projection", "rope", "norm", "gather"])
    for case in itertools.islice(found, 2 if setting.dry else None):
        yield f"{case.kernel}: {case.label}", partial(_measure, case, setting, roofline)
