"""Random lengths in the variants of attention that nothing but a GPU can prove; see :mod:`bench.campaign`."""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritontower.benchmarks.cases import Case, check
from tritontower.kernels.attention.attention import FlashAttentionConfig

from .kernel_stages import attention_fields, falls_back
from .runner import Item, Row, Setting

__all__ = ["LAUNCHES", "RUNS", "VARIANTS", "stress_items"]

Shape = tuple[int, int, int, int]
"""Query rows and keys of a block, warps, stages."""

VARIANTS: Mapping[str, Sequence[Shape]] = {
    "specialized": [(128, 128, 4, 2), (128, 64, 4, 2)],
    "fixed": [(128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    "single_block": [(64, 64, 4, 1)],
    "online": [(128, 64, 4, 3), (64, 64, 4, 3)],
}
"""Variant → the shapes that draws choose from."""
HEADS = ((64, 64), (72, 72), (72, 80), (80, 80))
"""Columns of a head, and how many it has in memory."""
HEAD_COUNTS = (1, 3, 16)
LAUNCHES = 10_000
"""Of every variant, over all head sizes that it takes."""
LAUNCHES_A_DRAW = 4
RUNS = 5
"""Items of a variant and head size: what is finished is not done again."""


def stress_items(setting: Setting) -> Iterator[Item]:
    """Random lengths in every variant and head size; a result has to be right, and the same every time."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for variant in VARIANTS:
        if setting.dry and variant == "specialized":
            continue  # nothing but a GPU runs it
        taken[variant] = []
        for head_dim, padded in HEADS:
            if why := _unsuitable(setting, variant, head_dim, padded):
                yield f"{variant}, {_shown(head_dim, padded)}", partial(_left_out, variant, why)
            else:
                taken[variant].append((head_dim, padded))
    for run in range(1 if setting.dry else RUNS):
        for variant, heads in taken.items():
            wanted = 1 if setting.dry else -(-LAUNCHES // (RUNS * max(1, len(heads))))
            for head_dim, padded in heads:
                make = partial(_stress, setting, variant, head_dim, padded, run, wanted)
                yield f"{variant}, {_shown(head_dim, padded)}, {run}", make


def _shown(head_dim: int, padded: int) -> str:
    return f"heads of {head_dim} of {padded}" if padded > head_dim else f"heads of {head_dim}"


def _unsuitable(setting: Setting, variant: str, head_dim: int, padded: int) -> str | None:
    """Why some draw of a variant would run as another; ``None`` if none would."""
    for shape in _shapes(setting, variant):
        for count in HEAD_COUNTS:
            case = _case(variant, shape, {"heads": count, "head_dim": head_dim, "padded": padded})
            if why := falls_back(case, setting.device):
                return why
    return None


def _left_out(variant: str, why: str) -> Row:
    return {"status": "skipped", "variant": variant, "reason": why}


def _shapes(setting: Setting, variant: str) -> Sequence[Shape]:
    return [(16, 64, 4, 1)] if setting.dry else VARIANTS[variant]


def _case(variant: str, shape: Shape, sizes: Mapping[str, Any]) -> Case:
    config = FlashAttentionConfig(**attention_fields(shape, variant))
    return Case("attention", variant, torch.bfloat16, sizes, config)


def _stress(setting: Setting, variant: str, head_dim: int, padded: int, seed: int, wanted: int) -> Row:
    """Draws until there are ``wanted`` launches."""
    chance = random.Random(f"{variant} {head_dim} {padded} {seed}")
    launches, worst, limit = 0, 0.0, 0.0
    wrong: list[Row] = []
    while launches < wanted:
        most = 64 if variant == "single_block" or setting.dry else chance.choice((64, 200, 700, 3000))
        others = 2 if setting.dry or most > 1000 else 8
        lengths = [chance.randint(0, most) for _ in range(chance.randint(1, others))] + [chance.randint(1, most)]
        shape = chance.choice(_shapes(setting, variant))
        sizes: dict[str, Any] = {"heads": 1 if setting.dry else chance.choice(HEAD_COUNTS), "head_dim": head_dim}
        sizes |= {"padded": padded, "lengths": lengths}
        if padded == head_dim:
            sizes["boost"] = chance.choice((1, 1, 4, 40))
        if variant == "single_block":
            sizes["length_bound"] = 64
        case = _case(variant, shape, sizes)
        prepared = case.prepare(setting.device)
        prepared.result().fill_(float("nan"))
        outcome = check(case, prepared, setting.device, most_rows=512)
        first = prepared.result().clone()
        same = True
        for _ in range(LAUNCHES_A_DRAW - 1):
            prepared.result().fill_(float("nan"))
            prepared.call()
            same = same and torch.equal(first, prepared.result())
        launches += LAUNCHES_A_DRAW
        worst, limit = max(worst, outcome.distance), outcome.limit
        if not (outcome.passed and same):
            kept = {"lengths": lengths, "config": str(case.config), "distance": outcome.distance, "same": same}
            wrong.append(kept)
    facts: Mapping[str, Any] = {"launches": launches, "worst": worst, "limit": limit, "wrong": wrong[:20]}
    return {
        "status": "failed" if wrong else "ok",
        "variant": variant,
        "wrong_draws": len(wrong),
        **facts,
    }
