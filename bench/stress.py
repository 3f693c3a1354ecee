"""Launches attention with random lengths, in the variants whose races and limits only a GPU can show.

    python -m bench.stress --launches 10000 --output stress.json

Every draw is checked against fp64, over output that was filled with NaN, and repeated launches must agree bit for bit.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritontower.benchmarks.cases import Case, check
from tritontower.benchmarks.documents import Report
from tritontower.cli.options import output_file
from tritontower.devices import parse_device

from .variants import Shape, attention_config, replaced_because

SHAPES: Mapping[str, Sequence[Shape]] = {
    "fixed": [(128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    "single_block": [(64, 64, 4, 1)],
    "online": [(128, 64, 4, 3), (64, 64, 4, 3)],
}
HEADS = ((64, 64), (72, 72), (72, 80), (80, 80))
"""Columns of a head, and its width in memory."""
HEAD_COUNTS = (1, 3, 16)
REPEATS = 4
"""Launches of one draw."""


def _case(variant: str, shape: Shape, sizes: Mapping[str, Any]) -> Case:
    return Case("attention", variant, torch.bfloat16, sizes, attention_config(shape, variant))


def unsupported(variant: str, head_dim: int, padded: int, device: torch.device) -> str | None:
    """Returns why some draw of a variant would run as another one; ``None`` if all run as configured."""
    for shape, heads in itertools.product(SHAPES[variant], HEAD_COUNTS):
        case = _case(variant, shape, {"heads": heads, "head_dim": head_dim, "padded": padded})
        if reason := replaced_because(case, device):
            return reason
    return None


def draw(chance: random.Random, variant: str, head_dim: int, padded: int, *, tiny: bool = False) -> Case:
    """A random call: lengths from 0 to 3,000 rows, peaked or flat scores."""
    longest = 64 if variant == "single_block" or tiny else chance.choice((64, 200, 700, 3000))
    others = 2 if longest > 1000 or tiny else 8
    lengths = [chance.randint(0, longest) for _ in range(chance.randint(1, others))] + [chance.randint(1, longest)]
    sizes: dict[str, Any] = {
        "heads": 1 if tiny else chance.choice(HEAD_COUNTS),
        "head_dim": head_dim,
        "padded": padded,
        "lengths": lengths,
    }
    if padded == head_dim:
        sizes["boost"] = chance.choice((1, 1, 4, 40))
    if variant == "single_block":
        sizes["length_bound"] = 64
    return _case(variant, (16, 64, 4, 1) if tiny else chance.choice(SHAPES[variant]), sizes)


def stress(
    variant: str, head_dim: int, padded: int, *, launches: int, device: torch.device, tiny: bool = False
) -> dict[str, Any]:
    """Draws until ``launches`` launches have run; the row counts the draws whose result was wrong or unstable."""
    chance = random.Random(f"{variant} {head_dim} {padded}")
    done, worst, limit = 0, 0.0, 0.0
    wrong: list[dict[str, Any]] = []
    while done < launches:
        case = draw(chance, variant, head_dim, padded, tiny=tiny)
        prepared = case.prepare(device)
        prepared.result().fill_(float("nan"))
        outcome = check(case, prepared, device, most_rows=512)
        first = prepared.result().clone()
        stable = True
        for _ in range(REPEATS - 1):
            prepared.result().fill_(float("nan"))
            prepared.call()
            stable = stable and torch.equal(first, prepared.result())
        done += REPEATS
        worst, limit = max(worst, outcome.distance), outcome.limit
        if not (outcome.passed and stable):
            wrong.append({"sizes": dict(case.sizes), "config": str(case.config), "distance": outcome.distance})
    return {
        "status": "failed" if wrong else "ok",
        "variant": variant,
        "head_dim": head_dim,
        "padded": padded,
        "launches": done,
        "worst": worst,
        "limit": limit,
        "wrong_draws": len(wrong),
        "wrong": wrong[:20],
    }


def main(words: Sequence[str] | None = None) -> int:
    """Runs every variant over the head sizes that it takes; returns 1 if a draw was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=10_000, help="of every variant (default: 10,000)")
    parser.add_argument("--variant", action="append", choices=list(SHAPES), help="may be repeated; default: all")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write the report here, as JSON")
    arguments = parser.parse_args(words)
    device = parse_device(None)
    report = Report("stress", device=device, path=arguments.output)
    for variant in arguments.variant or SHAPES:
        reasons = {heads: unsupported(variant, *heads, device) for heads in HEADS}
        taken = [heads for heads, reason in reasons.items() if reason is None]
        for (head_dim, padded), reason in reasons.items():
            row: dict[str, Any] = {"variant": variant, "head_dim": head_dim, "padded": padded}
            row |= {"status": "skipped", "reason": reason}
            if reason is None:
                share = arguments.launches // len(taken) + 1
                row = stress(variant, head_dim, padded, launches=share, device=device, tiny=device.type == "cpu")
            report.add(row)
            outcome = row.get("reason") or f"{row['launches']} launches, {row['wrong_draws']} wrong draws"
            print(f"{variant}, heads of {head_dim} in {padded}: {outcome}", flush=True)
    report.finish()
    return int(any(row["status"] == "failed" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
