"""Compares a whole tower with transformers: same machine, threads, dtype, checkpoint and pixels, in one process.

Candidates take turns, so that a drifting machine affects all of them.  A wrong result is never timed: each tower is first
compared with transformers in fp32 on a small image (:mod:`tritontower.parity.parity`), then the results of every batch with
each other.  Without a transformers model to compare with, a row says "unchecked".  Preprocessing is not timed here.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.devices import synchronize
from tritontower.errors import ReferenceModelError, UsageError
from tritontower.graph.cost import estimate_total_cost
from tritontower.graph.ir import Node
from tritontower.parity.parity import OutputParity, Reference, compare_outputs, relative_error
from tritontower.text_table import text_table

from . import peers
from .documents import Document, Report, describe_error, describe_machine, list_failures, median_seconds, milliseconds
from .images import noise_batch
from .kernels import OURS
from .matmul_only import matmul_only
from .measuring import interleaved
from .memory import allocated_peak

AGREEMENT = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}
"""Largest relative distance of the two implementations on a timed batch.

In 16 bits two correct implementations of a full-depth tower differ by a few percent.  This bound catches gross errors;
:data:`CHECKED_SIZE` catches the rest.
"""

CHECKED_SIZE = (224, 224)
"""Width and height of the image on which a tower is compared with transformers in fp32."""

EAGER = "tritontower eager"
"""Without CUDA graphs; on a GPU only."""
MATMUL_ONLY = "matmul only"
"""See :mod:`.matmul_only`."""

BASELINES: Mapping[str, str] = {
    "sdpa": "transformers sdpa",
    "eager": "transformers eager",
    "compile": "transformers sdpa, torch.compile",
    "openvino": "OpenVINO",
    "zentorch": "torch.compile, zentorch",
    "onnxruntime": "ONNX Runtime",
}
"""Option → name of the candidate in the document.  All run transformers' model; the last three need a CPU."""

PEERS = ("openvino", "zentorch", "onnxruntime")
"""Options of :mod:`.peers`, named as their packages."""

SHORT_SECONDS = 1.5
SHORT_REPEATS = 7
LONG_REPEATS = 3
"""Repeats by default: a single short run says more about other processes than a long one."""

Source = tuple[str | None, Callable[[], AbstractContextManager[Path]]]
"""Title of a tower, and a context in which its checkpoint exists."""

MakeBatch = tuple[str, Callable[[VisionTower], PackedBatch]]
"""Name of a batch, and the function that makes it."""


class CheckedReference(Reference):
    """transformers' implementation in the tower's dtype, with the comparison of both to fp32."""

    @cached_property
    def accuracy(self) -> Mapping[str, OutputParity]:
        """Distance of each output from transformers in fp32, on an image of :data:`CHECKED_SIZE`."""
        batch = noise_batch(self.tower, [CHECKED_SIZE])
        ours = {name: rows.clone() for name, rows in self.tower.run(batch).items()}
        theirs = self.run(batch)
        exact = theirs if self.dtype == torch.float32 else Reference(self.tower, torch.float32).run(batch)
        return compare_outputs(ours, None if exact is theirs else theirs, exact)


def benchmark_towers(
    sources: Sequence[Source],
    batches: Sequence[MakeBatch],
    *,
    device: torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    baselines: Sequence[str] = ("sdpa",),
    repeats: int | None = None,
    split: bool = False,
    path: Path | None = None,
) -> Document:
    """Times every batch on every tower; raises :class:`UsageError` if no tower takes any of the batches.

    Without ``baselines`` the towers are timed alone.  ``split`` also times every node (``node_seconds``).
    """
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise UsageError(f"against must be among {', '.join(BASELINES)}, got {', '.join(unknown)}")
    for name in baselines:
        if name in PEERS:
            peers.check_installed(name)
    report: Report | None = None
    for title, source in sources:
        with source() as folder:
            tower = VisionTower.from_pretrained(folder, device=device, dtype=dtype)
            eager = None
            if tower.device.type == "cuda":
                eager = VisionTower.from_pretrained(folder, device=device, dtype=dtype, cuda_graphs=False)
            reference, missing = None, {}
            try:
                reference = CheckedReference(tower, tower.dtype) if baselines else None
            except ReferenceModelError as error:
                missing = {"transformers": describe_error(error)}
            report = report or Report("towers", device=tower.device, dtype=tower.dtype, path=path)
            family = title or tower.config.family
            for name, make in batches:
                try:
                    batch = make(tower)
                except UsageError as error:
                    report.add({"family": family, "batch": name, "status": "skipped", "reason": str(error)})
                    continue
                options: dict[str, Any] = {"repeats": repeats, "baselines": baselines, "eager": eager}
                row = compare_times(tower, reference, batch, **options, family=family, batch=name)
                row["notes"] = {**row["notes"], **missing}
                if split and row["status"] == "ok":
                    row["node_seconds"] = node_seconds(eager or tower, batch, repeats or LONG_REPEATS)
                report.add(row)
            del tower, eager, reference
    if report is None:
        raise UsageError("no tower was named")
    if all(row["status"] == "skipped" for row in report.rows):
        raise UsageError(report.rows[0]["reason"])
    return report.finish()


def compare_times(
    tower: VisionTower,
    reference: CheckedReference | None,
    packed: PackedBatch,
    *,
    repeats: int | None = None,
    baselines: Sequence[str] = ("sdpa",),
    eager: VisionTower | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Checks and times one batch; returns its row.

    Without a ``reference`` the tower is timed alone.  ``eager`` is the same tower without CUDA graphs.
    """
    packed = packed.to(tower.device)
    workload = packed.workload
    cost = estimate_total_cost(tower.graph, workload, tower.dtype.itemsize)
    row: dict[str, Any] = {
        **fields,
        "blocks": tower.config.blocks_needed,
        "images": len(packed),
        "patches": workload.patches,
        "tokens": workload.tokens,
        "flops": cost.flops,
    }
    notes: dict[str, str] = {}
    if reference is not None:
        try:
            row["accuracy"] = {
                name: {"error": output.error, "limit": output.limit} for name, output in reference.accuracy.items()
            }
        except (ReferenceModelError, RuntimeError) as error:  # RuntimeError: out of memory
            notes["transformers in fp32"] = describe_error(error)
    off = [name for name, found in row.get("accuracy", {}).items() if not found["error"] <= found["limit"]]
    if off:
        words = ", ".join("{} by {error:.2e} (limit {limit:.2e})".format(name, **row["accuracy"][name]) for name in off)
        reason = f"too far from transformers in fp32 on an image of {' × '.join(map(str, CHECKED_SIZE))}: {words}"
        return {**row, "checked": False, "distances": {}, "notes": notes, "status": "failed", "reason": reason}
    start = time.perf_counter()
    result = tower.forward(packed).cpu()
    first_seconds = time.perf_counter() - start
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: tower.forward(packed)}
    if eager is not None:
        calls[EAGER] = lambda: eager.forward(packed)
    distances = {name: relative_error(call(), result) for name, call in calls.items()}
    for option in baselines if reference is not None else ():
        assert reference is not None
        name = BASELINES[option]
        try:
            call = _BUILD_BASELINE[option](reference, packed)
            distances[name] = relative_error(result, call()["embeddings"])
        except Exception as error:  # compilers and memory fail in many ways, none of which is this project's
            notes[name] = describe_error(error)
        else:
            calls[name] = call
    limit = AGREEMENT[str(tower.dtype).removeprefix("torch.")]
    checked = any(name in distances for name in BASELINES.values())
    row |= {"checked": checked, "distances": distances, "limit": limit, "notes": notes}
    wrong = {name: distance for name, distance in distances.items() if not distance <= limit}
    if wrong:
        words = ", ".join(f"{name} by {distance:.1e}" for name, distance in wrong.items())
        return {**row, "status": "failed", "reason": f"the embeddings differ: {words} (limit {limit:.0e})"}
    repeats = repeats or (SHORT_REPEATS if first_seconds < SHORT_SECONDS else LONG_REPEATS)
    times = interleaved(calls, repeats=repeats, device=tower.device)
    # Not in turn with the others: its large results cost transformers, which allocates a lot, a sixth of its time.
    bound = matmul_only(tower.graph, workload, device=tower.device, dtype=tower.dtype)
    times |= interleaved({MATMUL_ONLY: bound}, repeats=repeats, device=tower.device)
    if tower.device.type == "cuda":
        row |= _measure_memory(eager or tower, packed)
    row |= {
        "status": "ok",
        "seconds": {name: list(timing.seconds) for name, timing in times.items()},
        "tflops": cost.flops / times[OURS].median / 1e12,
    }
    return row | {"ratio": fastest_baseline(row)[1]}


def _measure_memory(tower: VisionTower, packed: PackedBatch) -> dict[str, int]:
    """The allocator's peak and the plan; a captured graph would hold its peak from then on."""
    tower.release()
    plan = tower.memory_plan(packed.workload)
    return {
        "peak_bytes": allocated_peak(lambda: tower.forward(packed), tower.device),
        "plan_bytes": plan.arena_bytes + plan.output_bytes,
    }


def node_seconds(tower: VisionTower, batch: PackedBatch, repeats: int = 3) -> dict[str, float]:
    """Median seconds of each node kind in one forward pass, the most expensive kind first.

    On a GPU the device is synchronized after every node, so the sum exceeds an ordinary forward pass.
    """
    batch = batch.to(tower.device)
    executor = tower.executor_for(batch)
    runs: list[dict[str, float]] = []
    last = 0.0

    def observe(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        nonlocal last
        synchronize(tower.device)
        end = time.perf_counter()
        runs[-1][node.kind] += end - last
        last = end

    for _ in range(repeats + 1):
        runs.append(defaultdict(float))
        synchronize(tower.device)
        last = time.perf_counter()
        executor.run(batch, observe)
    # The first run is not counted.
    medians = {kind: statistics.median(seconds[kind] for seconds in runs[1:]) for kind in runs[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def split_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of :func:`node_seconds`: one line per batch, kinds as columns."""
    kinds = list(dict.fromkeys(kind for seconds in rows.values() for kind in seconds))
    cells = [
        (name, *(milliseconds(seconds.get(kind), 1) for kind in kinds), milliseconds(sum(seconds.values()), 1))
        for name, seconds in rows.items()
    ]
    return text_table("Milliseconds by node kind", ("batch", *kinds, "sum"), cells)


def fastest_baseline(row: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The fastest baseline, and its median ÷ the tower's; ``None`` without one."""
    seconds = median_seconds(row)
    theirs = {name: value for name, value in seconds.items() if name in BASELINES.values()}
    if not theirs:
        return None, None
    name = min(theirs, key=lambda candidate: theirs[candidate])
    return name, theirs[name] / seconds[OURS]


def _sdpa(reference: Reference, batch: PackedBatch) -> peers.Outputs:
    inputs = reference.inputs(batch)
    return lambda: reference.outputs(inputs)


def _eager(reference: Reference, batch: PackedBatch) -> peers.Outputs:
    inputs = reference.inputs(batch)

    def call() -> Mapping[str, torch.Tensor]:
        with _attention(reference.model, "eager"):
            return reference.outputs(inputs)

    return call


def _compiled(reference: Reference, batch: PackedBatch) -> peers.Outputs:
    inputs = reference.inputs(batch)

    def outputs() -> Mapping[str, torch.Tensor]:
        return reference.implementation.outputs(reference.model, inputs, reference.tower.config)

    compiled = torch.compile(outputs, dynamic=False)

    def call() -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            return compiled()

    return call


_BUILD_BASELINE: Mapping[str, Callable[[Reference, PackedBatch], peers.Outputs]] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "compile": _compiled,
    **{name: getattr(peers, name) for name in PEERS},
}


@contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    """Switches the model's attention implementation, which its modules look up at every call."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = implementation
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def order_candidates(names: Iterable[str]) -> list[str]:
    """Sorts the distinct names of candidates, this project's first."""
    return sorted(set(names), key=lambda name: (name != OURS, not name.startswith(OURS), name == MATMUL_ONLY, name))


def table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table: milliseconds, medians."""
    names = order_candidates(name for row in found["rows"] for name in row.get("seconds", ()))
    columns = ("tower", "blocks", "batch", "patches", "tokens", *(f"{name}, ms" for name in names))
    rows = []
    for row in found["rows"]:
        if row["status"] == "skipped":
            continue
        ran = row["status"] == "ok"
        seconds = median_seconds(row) if ran else {}
        rows.append(
            (
                row["family"],
                row["blocks"],
                row["batch"],
                f"{row['patches']:,}",
                f"{row['tokens']:,}",
                *(milliseconds(seconds.get(name), 0 if seconds.get(name, 0.0) >= 0.1 else 2) for name in names),
                f"{row['ratio']:.2f}" if ran and row["ratio"] else None,
                f"{row['tflops']:,.3f}" if ran else "FAILED",
                f"{max(row['distances'].values()):.1e}" if row["checked"] else "unchecked",
            )
        )
    title = f"Forward pass, {found['dtype']}, {describe_machine(found)}; ratio: fastest baseline ÷ tritontower, medians"
    lines = [text_table(title, (*columns, "ratio", "TFLOP/s", "distance"), rows)]
    lines += list_failures(found, ("family", "batch"))
    splits = {f"{row['family']} {row['batch']}": row["node_seconds"] for row in found["rows"] if "node_seconds" in row}
    if splits:
        lines.append("\n" + split_table(splits))
    notes = dict.fromkeys(f"{name}: {why}" for row in found["rows"] for name, why in row.get("notes", {}).items())
    return "\n".join([*lines, *(f"left out: {note}" for note in notes)])
