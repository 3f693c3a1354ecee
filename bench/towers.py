"""A whole tower against transformers: same machine, same threads, same dtype, same checkpoint, in one run.

The checkpoint has the tower of Qwen2-VL-2B at full size with random weights (made once and kept in the cache).  Times
are of the forward pass; the two implementations take turns, so that a noisy machine hits both.  The embeddings of both
are compared before anything is timed: there is no speed from a wrong result.

Peak memory is measured in a process of its own that only loads the tower and runs it, as the growth of the resident set
over what the process held before loading, and set against the weights and the memory plan.

    python -m bench.towers --dtype bfloat16 --patches 1024,4096
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch import PackedBatch
from tritontower.costs import total_cost
from tritontower.demonstration import demonstration_checkpoint
from tritontower.drawing import text_table
from tritontower.layout import PictureLayout
from tritontower.parity import Reference, relative_error

from .measuring import interleaved, provenance

AGREEMENT = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}
"""Largest distance of the two implementations from each other before timing them is refused.  In 16 bits two correct
implementations of a full-depth tower differ by a few percent; this only catches what is plainly wrong."""

COLUMNS = ("patches", "tokens", "tritontower ms", "transformers ms", "ratio", "best ratio", "TFLOP/s", "distance")
MEMORY_COLUMNS = ("patches", "growth MB", "weights MB", "plan MB", "over both MB")


def still(tower: VisionTower, patches: int) -> PackedBatch:
    """One square still picture of about ``patches`` patches, of random pixels."""
    side = 2 * max(1, round(patches**0.5 / 2))
    pixels = torch.randn(side * side, tower.config.patch.still_inner, generator=torch.Generator().manual_seed(patches))
    layout = PictureLayout.of_one_view((1, side, side), tower.config.patch.size)
    return PackedBatch.pack(
        tower.config,
        pixels,
        [layout],
        original_sizes=[layout.processed_size],
        content_hashes=[f"random-{patches}"],
    )


def compare_times(tower: VisionTower, reference: Reference, batch: PackedBatch, repeats: int) -> dict[str, Any]:
    """The line of the table for one batch."""
    batch = batch.to(tower.device)
    distance = relative_error(tower.forward(batch), reference.forward(batch))
    limit = AGREEMENT[str(tower.dtype).removeprefix("torch.")]
    if not distance <= limit:
        raise SystemExit(f"the embeddings differ by {distance:.2e} (limit {limit:.0e}): nothing to time")
    inputs = reference.inputs(batch)
    candidates = {"ours": lambda: tower.forward(batch), "theirs": lambda: reference.outputs(inputs)}
    times = interleaved(candidates, repeats=repeats, device=tower.device)
    ours, theirs = times["ours"], times["theirs"]
    flops = total_cost(tower.graph, batch.workload, tower.dtype.itemsize).flops
    return {
        "patches": batch.workload.patches,
        "tokens": batch.workload.tokens,
        "seconds": ours.seconds,
        "transformers_seconds": theirs.seconds,
        "ratio": theirs.median / ours.median,
        "best_ratio": theirs.best / ours.best,
        "tflops": flops / ours.median / 1e12,
        "distance": distance,
    }


def memory_of(folder: Path, dtype: str, patches: int) -> dict[str, Any]:
    """Loads and runs the tower in this process and says how far the resident set grew."""
    tower = VisionTower.from_pretrained(folder, device="cpu", dtype=dtype, delay_load=True)
    batch = still(tower, patches)
    before = _peak_bytes()
    tower.load().forward(batch)
    plan = tower.memory_plan(patches)
    return {
        "patches": patches,
        "growth_bytes": _peak_bytes() - before,
        "weights_bytes": tower.weights_bytes,
        "plan_bytes": plan.arena_bytes + plan.output_bytes,
    }


def _peak_bytes() -> int:
    """The largest resident set of this process so far.

    ``getrusage`` would not do: its figure survives ``exec`` and starts at the parent's.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _memory_in_child(arguments: argparse.Namespace, patches: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.towers", "--memory-of", str(patches), "--dtype", arguments.dtype]
    command += ["--threads", str(torch.get_num_threads()), "--model", str(arguments.model)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: random weights, made and cached")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(AGREEMENT))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patches", default="1024,4096", help="comma-separated patch counts of one square picture")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--memory-of", type=int, metavar="PATCHES", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it")
    torch.set_num_threads(arguments.threads)
    arguments.model = arguments.model or demonstration_checkpoint()
    if arguments.memory_of is not None:
        print(json.dumps(memory_of(arguments.model, arguments.dtype, arguments.memory_of)))
        return

    patches = [int(count) for count in arguments.patches.split(",")]
    device = torch.device(arguments.device)
    memory = [_memory_in_child(arguments, count) for count in patches] if device.type == "cpu" else []
    tower = VisionTower.from_pretrained(arguments.model, device=device, dtype=arguments.dtype)
    reference = Reference(tower, tower.dtype)
    rows = [compare_times(tower, reference, still(tower, count), arguments.repeats) for count in patches]
    document = {"bench": "towers", "dtype": arguments.dtype, **provenance(device), "rows": rows, "memory": memory}
    _print_tables(document)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


def _print_tables(document: dict[str, Any]) -> None:
    cells: list[tuple[str, ...]] = [
        (
            f"{row['patches']:,}",
            f"{row['tokens']:,}",
            f"{1e3 * sorted(row['seconds'])[len(row['seconds']) // 2]:,.0f}",
            f"{1e3 * sorted(row['transformers_seconds'])[len(row['transformers_seconds']) // 2]:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['best_ratio']:.2f}",
            f"{row['tflops']:.3f}",
            f"{row['distance']:.1e}",
        )
        for row in document["rows"]
    ]
    where = document.get("gpu") or f"{document['threads']} threads of {document['cpu']}"
    print(
        text_table(
            f"Qwen2-VL-2B tower, {document['dtype']}, {where}; ratio: transformers ÷ tritontower", COLUMNS, cells
        )
    )
    if document["memory"]:
        megabytes = [[row["growth_bytes"], row["weights_bytes"], row["plan_bytes"]] for row in document["memory"]]
        cells = [
            (f"{row['patches']:,}", *(f"{size / 1e6:,.0f}" for size in (*sizes, sizes[0] - sizes[1] - sizes[2])))
            for row, sizes in zip(document["memory"], megabytes, strict=True)
        ]
        print(text_table("\nPeak resident memory", MEMORY_COLUMNS, cells))


if __name__ == "__main__":
    main()
