"""A whole tower against transformers: same machine, same threads, same dtype, same checkpoint, in one run.

The candidates take turns, so that a machine that drifts hits all alike, and their results are compared before anything is
timed: there is no speed from a wrong result.  Each tower is first held against transformers in fp32, on an image that costs
little, by the project's own rule (:mod:`tritontower.parity.parity`); then the results of every pass are held against each other.
Where there is no transformers to compare with, a time says "unchecked".  The tower's products alone are timed behind them
(:mod:`.products`): they say how much of a pass could still be saved.  Both implementations get the same preprocessed pixels
on the device; preprocessing is not timed here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.errors import ReferenceModelError, UsageError
from tritontower.graph.cost import estimate_total_cost
from tritontower.parity.parity import OutputParity, Reference, relative_error
from tritontower.text_table import text_table

from .documents import Document, document, machine, reason_of, seconds_of
from .images import images_of
from .measuring import interleaved
from .products import products_alone
from .split import node_seconds, split_table

__all__ = [
    "AGREEMENT",
    "OURS",
    "PRODUCTS",
    "RIVALS",
    "CheckedReference",
    "Pass",
    "Source",
    "benchmark_towers",
    "check_rivals",
    "compare_times",
    "fastest_rival",
    "load_towers",
    "reference_of",
    "tower_table",
    "tower_titles",
]

AGREEMENT = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}
"""Largest distance of the two implementations from each other, on the very pass, before timing them is refused.  In 16 bits
two correct implementations of a full-depth tower differ by a few percent; this only catches what is plainly wrong, and
:data:`CHECKED_SIZE` the rest."""

CHECKED_SIZE = (224, 224)
"""Width and height of the image on which a tower is held against transformers in fp32."""

OURS = "tritontower"
EAGER = "tritontower eager"
"""Without CUDA graphs; on a GPU only, where ``OURS`` is with them."""
PRODUCTS = "products alone"
"""What :mod:`.products` times: a bound for every other candidate."""

RIVALS: Mapping[str, str] = {
    "sdpa": "transformers sdpa",
    "eager": "transformers eager",
    "compile": "transformers sdpa, torch.compile",
}
"""What a tower may be timed against → the candidate's name in the document."""

Forward = Callable[[], object]

Source = tuple[str | None, Callable[[], AbstractContextManager[Path]]]
"""What to call a tower, and where its checkpoint is while it is needed."""

Pass = tuple[str, Callable[[VisionTower], PackedBatch]]
"""What to call a pass, and how its batch is made."""


class CheckedReference(Reference):
    """transformers' implementation in the tower's dtype, and what it says of the tower beside the one in fp32."""

    @cached_property
    def accuracy(self) -> Mapping[str, OutputParity]:
        """How close each output of the tower comes to transformers in fp32, on an image of :data:`CHECKED_SIZE`.

        Raises:
            ReferenceModelError: only one of the two has an output.
        """
        batch = images_of(self.tower, [CHECKED_SIZE])
        ours = {name: rows.clone() for name, rows in self.tower.run(batch).items()}
        theirs = self.run(batch)
        exact = theirs if self.dtype == torch.float32 else Reference(self.tower, torch.float32).run(batch)
        if absent := sorted(ours.keys() ^ exact.keys()):
            raise ReferenceModelError(f"only one of the tower and transformers has the outputs {', '.join(absent)}")
        return {
            name: OutputParity(
                relative_error(rows, exact[name]),
                None if exact is theirs else relative_error(theirs[name], exact[name]),
            )
            for name, rows in ours.items()
        }


def benchmark_towers(
    sources: Sequence[Source],
    passes: Sequence[Pass],
    *,
    device: torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    rivals: Sequence[str] = ("sdpa",),
    repeats: int = 3,
    split: bool = False,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> Document:
    """Times every pass on every tower.

    Args:
        sources: the towers.
        passes: what they run.
        device: by default the first GPU, else the CPU.
        dtype: by default each checkpoint's own.
        rivals: of :data:`RIVALS`; empty: the towers alone.
        repeats: how often each candidate runs, beside a first time that does not count.
        split: also time every node, and say for each pass how long those of one kind took (``node_seconds``).
        report: called with every row as soon as it is there.

    Raises:
        UsageError: no tower can take any of the passes.
    """
    check_rivals(rivals)
    rows: list[dict[str, Any]] = []
    for title, source in sources:
        with source() as folder:
            tower, eager = load_towers(folder, device=device, dtype=dtype)
            reference, missing = reference_of(tower) if rivals else (None, {})
            facts: dict[str, Any] = {"family": title or tower.config.family}
            for name, make in passes:
                try:
                    batch = make(tower)
                except UsageError as error:
                    row: dict[str, Any] = {**facts, "pack": name, "status": "skipped", "reason": str(error)}
                else:
                    row = compare_times(
                        tower, reference, batch, repeats=repeats, rivals=rivals, eager=eager, pack=name, **facts
                    )
                    row["notes"] = {**row["notes"], **missing}
                    if split and row["status"] == "ok":
                        row["node_seconds"] = node_seconds(eager or tower, batch, repeats)
                rows.append(row)
                if report is not None:
                    report(row)
            where, kind = tower.device, tower.dtype
            del tower, eager, reference
    if not rows or all(row["status"] == "skipped" for row in rows):
        raise UsageError(rows[0]["reason"] if rows else "no tower was named")
    return document("towers", rows, device=where, dtype=kind)


def load_towers(
    folder: Path, *, device: torch.device | None, dtype: str | torch.dtype
) -> tuple[VisionTower, VisionTower | None]:
    """The tower as it comes, and on a GPU the same without CUDA graphs."""
    tower = VisionTower.from_pretrained(folder, device=device, dtype=dtype)
    if tower.device.type != "cuda":
        return tower, None
    return tower, VisionTower.from_pretrained(folder, device=device, dtype=dtype, cuda_graphs=False)


def reference_of(tower: VisionTower) -> tuple[CheckedReference | None, dict[str, str]]:
    """transformers' implementation, or why there is none."""
    try:
        return CheckedReference(tower, tower.dtype), {}
    except ReferenceModelError as error:
        return None, {"transformers": reason_of(error)}


def compare_times(
    tower: VisionTower,
    reference: CheckedReference | None,
    batch: PackedBatch,
    *,
    repeats: int = 3,
    rivals: Sequence[str] = ("sdpa",),
    eager: VisionTower | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """The row of one batch.

    ``checked`` in it says whether the result was held against one of transformers' own; ``accuracy`` how far each output of
    the tower, on the image of :data:`CHECKED_SIZE`, is from transformers in fp32, and how far it may be.

    Args:
        tower: loaded.
        eager: the same tower without CUDA graphs, timed beside it.
        reference: transformers' implementation of it; ``None`` to time the tower alone.
        batch: what to run.
        repeats: how often each candidate runs, beside a first time that does not count.
        rivals: of :data:`RIVALS`.
        facts: more fields of the row.
    """
    batch = batch.to(tower.device)
    workload = batch.workload
    cost = estimate_total_cost(tower.graph, workload, tower.dtype.itemsize)
    row: dict[str, Any] = {
        **facts,
        "blocks": tower.config.blocks_needed,
        "images": len(batch),
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
        except (ReferenceModelError, RuntimeError) as error:  # torch's own where there is no memory for it
            notes["transformers in fp32"] = reason_of(error)
    off = [name for name, found in row.get("accuracy", {}).items() if not found["error"] <= found["limit"]]
    if off:
        words = ", ".join("{} by {error:.2e} (limit {limit:.2e})".format(name, **row["accuracy"][name]) for name in off)
        reason = f"too far from transformers in fp32, on an image of {' × '.join(map(str, CHECKED_SIZE))}: {words}"
        return {**row, "checked": False, "distances": {}, "notes": notes, "status": "failed", "reason": reason}
    limit = AGREEMENT[str(tower.dtype).removeprefix("torch.")]
    result = tower.forward(batch).clone()
    calls: dict[str, Forward] = {OURS: lambda: tower.forward(batch)}
    if eager is not None:
        calls[EAGER] = lambda: eager.forward(batch)
    distances: dict[str, float] = {}
    for name, call in calls.items():
        distances[name] = relative_error(call(), result)  # type: ignore[arg-type]
    for rival in rivals if reference is not None else ():
        assert reference is not None
        name = RIVALS[rival]
        try:
            call = _BUILD_RIVAL[rival](reference, reference.inputs(batch))
            distances[name] = relative_error(result, call()["embeddings"])
        except Exception as error:  # compilers and memory fail in many ways, none of which is this project's
            notes[name] = reason_of(error)
        else:
            calls[name] = call
    checked = any(name in distances for name in RIVALS.values())
    row |= {"checked": checked, "distances": distances, "limit": limit, "notes": notes}
    wrong = {name: distance for name, distance in distances.items() if not distance <= limit}
    if wrong:
        words = ", ".join(f"{name} by {distance:.1e}" for name, distance in wrong.items())
        return {**row, "status": "failed", "reason": f"the embeddings differ: {words} (limit {limit:.0e})"}
    times = interleaved(calls, repeats=repeats, device=tower.device)
    # Behind the others: in turn with them, its large results cost transformers, which allocates a lot, a sixth of its time.
    products = products_alone(tower.graph, workload, device=tower.device, dtype=tower.dtype)
    times |= interleaved({PRODUCTS: products}, repeats=repeats, device=tower.device)
    ours = times[OURS]
    if tower.device.type == "cuda":
        row |= _memory_of(eager or tower, batch)
    row |= {
        "status": "ok",
        "seconds": {name: list(timing.seconds) for name, timing in times.items()},
        "tflops": cost.flops / ours.median / 1e12,
    }
    return row | {"ratio": fastest_rival(row)[1]}


def _memory_of(tower: VisionTower, batch: PackedBatch) -> dict[str, int]:
    """The allocator's peak over what was held before, and the plan; with graphs the peak is held from then on."""
    tower.release()
    held = torch.cuda.memory_allocated(tower.device)
    torch.cuda.reset_peak_memory_stats(tower.device)
    tower.forward(batch)
    torch.cuda.synchronize(tower.device)
    plan = tower.memory_plan(batch.workload)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(tower.device) - held,
        "plan_bytes": plan.arena_bytes + plan.output_bytes,
    }


def fastest_rival(row: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Which of transformers' candidates is the fastest, and its time ÷ the tower's, medians; ``None`` without one."""
    seconds = seconds_of(row)
    theirs = {name: value for name, value in seconds.items() if name in RIVALS.values()}
    if not theirs:
        return None, None
    name = min(theirs, key=lambda candidate: theirs[candidate])
    return name, theirs[name] / seconds[OURS]


# -- transformers -----------------------------------------------------------------------------------------------------

Outputs = Callable[[], Mapping[str, torch.Tensor]]


def _sdpa(reference: Reference, inputs: Any) -> Outputs:
    return lambda: reference.outputs(inputs)


def _eager(reference: Reference, inputs: Any) -> Outputs:
    def call() -> Mapping[str, torch.Tensor]:
        with _attention(reference.model, "eager"):
            return reference.outputs(inputs)

    return call


def _compiled(reference: Reference, inputs: Any) -> Outputs:
    def outputs() -> Mapping[str, torch.Tensor]:
        return reference.implementation.outputs(reference.model, inputs, reference.tower.config)

    compiled = torch.compile(outputs, dynamic=False)

    def call() -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            return compiled()

    return call


_BUILD_RIVAL: Mapping[str, Callable[[Reference, Any], Outputs]] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "compile": _compiled,
}


@contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    """The model with another of transformers' attentions; its modules look it up whenever they run."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = implementation
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


# -- tables -----------------------------------------------------------------------------------------------------------


def tower_titles(found: Mapping[str, Any]) -> Sequence[str]:
    """The candidates of a document, this project's first."""
    names = dict.fromkeys(name for row in found["rows"] for name in row.get("seconds", ()))
    return sorted(names, key=lambda name: (name != OURS, name != EAGER, name == PRODUCTS, name))


def tower_table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table: milliseconds, medians."""
    names = tower_titles(found)
    columns = ("tower", "blocks", "pack", "patches", "tokens", *(f"{name}, ms" for name in names))
    rows = []
    for row in found["rows"]:
        if row["status"] == "skipped":
            continue
        ran = row["status"] == "ok"
        seconds = seconds_of(row) if ran else {}
        rows.append(
            (
                row["family"],
                row["blocks"],
                row["pack"],
                f"{row['patches']:,}",
                f"{row['tokens']:,}",
                *(f"{1e3 * seconds[name]:,.{_digits(seconds[name])}f}" if name in seconds else None for name in names),
                f"{row['ratio']:.2f}" if ran and row["ratio"] else None,
                f"{row['tflops']:,.3f}" if ran else "FAILED",
                f"{max(row['distances'].values()):.1e}" if row["checked"] else "unchecked",
            )
        )
    title = f"Forward pass, {found['dtype']}, {machine(found)}; ratio: fastest transformers ÷ tritontower, medians"
    lines = [text_table(title, (*columns, "ratio", "TFLOP/s", "distance"), rows)]
    lines += [
        f"{row['status']}: {row['family']}, {row['pack']}: {row['reason']}"
        for row in found["rows"]
        if row["status"] != "ok"
    ]
    splits = {f"{row['family']} {row['pack']}": row["node_seconds"] for row in found["rows"] if "node_seconds" in row}
    if splits:
        lines.append("\n" + split_table(splits))
    notes = dict.fromkeys(f"{name}: {why}" for row in found["rows"] for name, why in row.get("notes", {}).items())
    return "\n".join([*lines, *(f"left out: {note}" for note in notes)])


def _digits(seconds: float) -> int:
    return 0 if seconds >= 0.1 else 2


def check_rivals(names: Sequence[str]) -> Sequence[str]:
    """``names`` if they are all of :data:`RIVALS`.

    Raises:
        UsageError: one is not.
    """
    unknown = [name for name in names if name not in RIVALS]
    if unknown:
        raise UsageError(f"transformers runs as {', '.join(RIVALS)}; not as {', '.join(unknown)}")
    return names
