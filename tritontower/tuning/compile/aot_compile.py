"""AOT compilation of tasks: what a configuration compiles to without the device, through Triton's own launch path.

A child process (:mod:`.worker`) records the launches (:mod:`.recording`) of the operation, called as a tower would.

Results are kept on disk, one file each.  Its name is a digest of everything that decides the result: the kernel's source, the
source that launches it and reads the machine code, the versions of Triton and its assembler, the architecture, the launch and
the configuration.  An interrupted run therefore resumes.  Only the compiler's own failures are kept: a process that was
killed or took too long proves nothing about a configuration.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tritontower.benchmarks.documents import describe_error, replace_file
from tritontower.benchmarks.measuring import ptxas_version
from tritontower.engine import tuned_tables
from tritontower.tuning import operations
from tritontower.tuning.tasks import Task, make_pairs

from . import compiled_kernel, disassembly, recording
from .compiled_kernel import CompiledKernel, read_compiled
from .recording import install_recorder
from .worker import Death, answer_orders, answers

CHILD = "from tritontower.tuning.compile.aot_compile import serve; serve()"
"""Code of a child process."""

_ROWS, _INNER, _HEADS = 256, 1024, 16
"""Sizes of the representative of a compile."""


@dataclass(frozen=True)
class Order:
    """One configuration of one task, to be compiled for one architecture."""

    task: Task
    config: tuple[tuple[str, Any], ...]
    architecture: str


@dataclass(frozen=True)
class CompileResult:
    """Compiled kernels of an order, or the error."""

    launches: tuple[CompiledKernel, ...] = ()
    error: str | None = None
    """The compiler's message, or how its process ended."""
    is_cached: bool = field(default=False, compare=False)

    @property
    def main(self) -> CompiledKernel:
        """The launch with the most tensor-core instructions; the first one if there are none."""
        return max(self.launches, key=lambda launch: sum(launch.tensor_core.values()))

    def problems(self, task: Task, architecture: str) -> list[str]:
        """Lists the rules that the configuration breaks; empty if it may be used."""
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        has_matmul = task.kernel != "rowwise.norm" and task.dtype != "float32"
        return [
            problem
            for launch in self.launches
            for problem in launch.problems(architecture, wants_tensor_core=has_matmul and launch == self.main)
        ]


def representative(order: Order) -> Order:
    """Returns the order that is compiled for all orders with the same code.

    Kernels are specialized on whether a size is a multiple of 16 and whether blocks divide K, not on the size.  The number of
    parts of a split K does not matter.
    """
    task, config = order.task, dict(order.config)
    for name, most in (("split", 2), ("group_rows", 8)):
        if name in config:
            config[name] = min(config[name], most)
    constants, details = dict(task.constants), dict(task.details)
    sizes = dict.fromkeys(dict(task.sizes), _ROWS)
    if "rows" in details:
        details["rows"] = _ROWS
    if "inner" in constants:
        constants["inner"] = _INNER + constants["inner"] % 128
    if task.kernel in ("gemm.linear", "gemm.patch_projection"):
        constants["columns"] = _INNER + constants["columns"] % 16
    if "heads" in details and details["heads"] % 2 == 0:
        if "columns" in constants:
            constants["columns"] = constants["columns"] // details["heads"] * _HEADS
        details["heads"] = _HEADS
    if "bounded" in constants:
        if config.get("variant") != "single_block":
            constants["bounded"] = 0
        sizes["longest"] = min(constants["bounded"] or _ROWS, _ROWS)
    same = Task(
        task.kernel, task.dtype, make_pairs(**constants), make_pairs(**sizes), make_pairs(**details), node=task.kernel
    )
    return Order(same, make_pairs(**config), order.architecture)


def cache_folder() -> Path:
    """Returns the folder of compile results: ``compiled`` beside the user's tables."""
    return (tuned_tables.cache_folder() or Path(tempfile.gettempdir()) / "tritontower") / "compiled"


def compile_orders(
    orders: Sequence[Order], *, workers: int = 1, cache: Path | None = None, deadline: float = math.inf
) -> Generator[tuple[int, CompileResult]]:
    """Yields the index and the result of every order, cached results first.

    Orders with the same representative are compiled once; orders that are not compiled at ``deadline`` are not yielded.
    """
    places: dict[str, list[int]] = {}
    for index, order in enumerate(orders):
        places.setdefault(digest(order), []).append(index)
    waiting: list[str] = []
    for key, indices in places.items():
        known = None if cache is None else _read(cache / f"{key}.json")
        if known is None:
            waiting.append(key)
        else:
            yield from ((index, known) for index in indices)
    todo = [representative(orders[places[key][0]]) for key in waiting]
    for position, answer in answers(todo, CHILD, workers=workers, deadline=deadline):
        result = CompileResult(error=answer.reason) if isinstance(answer, Death) else answer
        if cache is not None and (not isinstance(answer, Death) or answer.aborted):
            content = {"launches": [asdict(launch) for launch in result.launches], "error": result.error}
            replace_file(cache / f"{waiting[position]}.json", json.dumps(content))
        yield from ((index, result) for index in places[waiting[position]])


def digest(order: Order) -> str:
    """Returns the name of the file with an order's result."""
    import triton

    order = representative(order)
    task = order.task
    parts = [
        tuned_tables.source_digest(task.kernel), _reading_digest(), triton.__version__, assembler_version(order.architecture),
        order.architecture, task.kernel, task.dtype, task.constants, task.sizes, task.details, order.config,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@lru_cache
def _reading_digest() -> str:
    """Returns a digest of the source that launches kernels for a compile and reads the machine code."""
    files = (__file__, operations.__file__, compiled_kernel.__file__, disassembly.__file__, recording.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


@lru_cache
def assembler_version(architecture: str) -> str | None:
    """Returns the release of NVIDIA's assembler for an architecture; AMD's is a part of Triton."""
    return ptxas_version(int(architecture.removeprefix("sm_"))) if architecture.startswith("sm_") else None


def _read(path: Path) -> CompileResult | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        launches = tuple(CompiledKernel(**launch) for launch in content["launches"])
        return CompileResult(launches, content["error"], is_cached=True)
    except (OSError, ValueError, TypeError, KeyError):  # missing, truncated, or from another release: compile again
        return None


def serve() -> None:
    """Runs the child process: compiles orders and launches nothing."""
    recorder = install_recorder()

    def answer(order: Order) -> CompileResult:
        recorder.start(order.architecture)
        try:
            operations.prepare(order.task, torch.device("cpu")).run(dict(order.config))
            launches = {launch.compiled.hash: launch for launch in recorder.launches}.values()
            return CompileResult(tuple(read_compiled(launch, order.architecture) for launch in launches))
        except (OSError, MemoryError):  # the machine is at fault, not the configuration: the process ends
            raise
        except Exception as error:
            return CompileResult(error=describe_error(error, 250))

    answer_orders(answer)
