"""Launches without the device: what a configuration compiles to, through Triton's own launch path.

A child process (:mod:`.children`) puts a stand-in in the place of Triton's driver, which names the chip, and tensors of
the CPU, which nobody fills, in the place of the device's.  Then it calls the operation as a tower would.  Triton binds
the arguments, specializes the kernel on them and compiles; there it ends.

What was compiled ahead is kept on disk, a file each, named by everything that decides what comes out: the kernel's source, the
source of what launches it and reads the machine code, the versions of Triton and of its assembler, the architecture, the
launch and the configuration.  A run that is killed goes on where it was.  Of failures only the compiler's own are kept: a
process that was killed, or ended because it took too long, says nothing of what a configuration compiles to.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tritontower.benchmarks.measuring import ptxas_version
from tritontower.engine import tuned_tables as tables
from tritontower.kernels.runtime.config import SHARED_MEMORY_LIMIT
from tritontower.tuning import operations, static
from tritontower.tuning.predict import Compiled
from tritontower.tuning.static import TENSOR_CORE_PREFIX, compiled_facts_of, machine_facts
from tritontower.tuning.tasks import Task

from . import disassembly
from .worker import Death, answer_orders, answers

__all__ = ["CompileResult", "Launch", "Order", "cache_folder", "compile_orders", "problems", "stand_in"]

_CHILD = "from tritontower.tuning.compile.aot_compile import _serve; _serve()"

_ROWS, _INNER, _HEADS = 256, 1024, 16
"""Sizes of a compile_result."""


@dataclass(frozen=True)
class Order:
    """One configuration of one task, to be compiled for one architecture."""

    task: Task
    config: tuple[tuple[str, Any], ...]
    architecture: str


@dataclass(frozen=True)
class Launch:
    """What one of an operation's kernels compiled to."""

    kernel: str
    num_warps: int
    threads: int
    registers: int
    spills: int
    stack: int
    shared_memory: int
    occupancy: int
    tensor_core: dict[str, int]
    instructions: int
    loop_instructions: int | None

    def compiled(self, architecture: str) -> Compiled:
        """The facts that the model of :mod:`.predict` takes."""
        return compiled_facts_of(
            architecture, self.threads, self.num_warps, self.occupancy, self.instructions, self.loop_instructions
        )


@dataclass(frozen=True)
class CompileResult:
    """What became of an order."""

    launches: tuple[Launch, ...] = ()
    error: str | None = None
    """The compiler's message, or how its process died."""
    cached: bool = field(default=False, compare=False)

    @property
    def main(self) -> Launch:
        """The launch that does the products, or, where none does, the first."""
        return max(self.launches, key=lambda launch: sum(launch.tensor_core.values()))


def stand_in(order: Order) -> Order:
    """The order whose compile_result stands for ``order``'s: the same code is compiled for many sizes.

    Kernels are specialized on whether a size is a multiple of 16 and whether blocks divide K, not on the size; and in how
    many parts K is cut matters only if it is cut.
    """
    task, config = order.task, dict(order.config)
    for name, most in (("split", 2), ("group_rows", 8)):
        if name in config:
            config[name] = min(config[name], most)
    constants, facts = dict(task.constants), dict(task.facts)
    sizes = dict.fromkeys(dict(task.sizes), _ROWS)
    if "rows" in facts:
        facts["rows"] = _ROWS
    if "inner" in constants:
        constants["inner"] = _INNER + constants["inner"] % 128
    if task.kernel in ("gemm.linear", "gemm.patch_projection"):
        constants["columns"] = _INNER + constants["columns"] % 16
    if "heads" in facts and facts["heads"] % 2 == 0:
        if "columns" in constants:
            constants["columns"] = constants["columns"] // facts["heads"] * _HEADS
        facts["heads"] = _HEADS
    if "bounded" in constants:
        if config.get("variant") != "single_block":
            constants["bounded"] = 0
        sizes["longest"] = min(constants["bounded"] or _ROWS, _ROWS)
    same = Task(
        task.kernel,
        task.dtype,
        tuple(sorted(constants.items())),
        tuple(sorted(sizes.items())),
        tuple(sorted(facts.items())),
        node=task.kernel,
    )
    return Order(same, tuple(sorted(config.items())), order.architecture)


def problems(compile_result: CompileResult, architecture: str, dtype: str, *, products: bool = True) -> list[str]:
    """Why a configuration may not be taken, as sentences; empty when it may."""
    if compile_result.error is not None:
        return [f"does not compile: {compile_result.error}"]
    broken = []
    for launch in compile_result.launches:
        if launch.spills or launch.stack:
            broken.append(f"spills registers ({launch.spills} instructions, {launch.stack} bytes of stack)")
        if launch.shared_memory > SHARED_MEMORY_LIMIT[architecture]:
            limit = SHARED_MEMORY_LIMIT[architecture]
            broken.append(f"takes {launch.shared_memory} bytes of shared memory, the limit is {limit}")
    prefix = TENSOR_CORE_PREFIX[architecture]
    if products and dtype != "float32" and not any(name.startswith(prefix) for name in compile_result.main.tensor_core):
        broken.append(f"has no {prefix} instruction")
    return broken


def cache_folder() -> Path:
    """Where compile_results are kept: ``compiled`` beside the user's tables."""
    return (tables.cache_folder() or Path(tempfile.gettempdir()) / "tritontower") / "compiled"


def compile_orders(
    orders: Sequence[Order], *, workers: int = 1, cache: Path | None = None, deadline: float = math.inf
) -> Generator[tuple[int, CompileResult]]:
    """Yields every order's index and what became of it, those first that are known from before.

    Args:
        orders: what to compile; orders that stand for the same compile are compiled once.
        workers: compiler processes at the same time.
        cache: a folder to keep compile_results in; ``None``: keep none.
        deadline: of ``time.monotonic()``; what is not compiled then is not yielded.
    """
    places: dict[str, list[int]] = {}
    for index, order in enumerate(orders):
        places.setdefault(_digest(order), []).append(index)
    waiting: list[str] = []
    for digest, indices in places.items():
        known = None if cache is None else _read(cache / f"{digest}.json")
        if known is None:
            waiting.append(digest)
        else:
            yield from ((index, known) for index in indices)
    todo = [stand_in(orders[places[digest][0]]) for digest in waiting]
    for position, answer in answers(todo, _CHILD, workers=workers, deadline=deadline):
        if isinstance(answer, Death):
            done, lasting = CompileResult(error=answer.reason), answer.aborted
        else:
            done, lasting = _compile_result(answer), True
        if cache is not None and lasting:
            _write(cache / f"{waiting[position]}.json", done)
        yield from ((index, done) for index in places[waiting[position]])


def _digest(order: Order) -> str:
    import triton

    order = stand_in(order)
    task = order.task
    facts = [
        tables.source_digest(task.kernel), _reading_digest(), triton.__version__, _assembler(order.architecture),
        order.architecture, task.kernel, task.dtype, task.constants, task.sizes, task.facts, order.config,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


@lru_cache
def _reading_digest() -> str:
    """Of the text of what launches a kernel for a compile_result and of what reads what it compiled to."""
    files = (__file__, operations.__file__, static.__file__, disassembly.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


@lru_cache
def _assembler(architecture: str) -> str | None:
    """The release of NVIDIA's assembler for an architecture; AMD's is a part of Triton."""
    return ptxas_version(int(architecture.removeprefix("sm_"))) if architecture.startswith("sm_") else None


def _compile_result(answer: Mapping[str, Any], *, cached: bool = False) -> CompileResult:
    return CompileResult(tuple(Launch(**launch) for launch in answer["launches"]), answer["error"], cached)


def _read(path: Path) -> CompileResult | None:
    try:
        return _compile_result(json.loads(path.read_text(encoding="utf-8")), cached=True)
    except (OSError, ValueError, TypeError, KeyError):  # absent, cut off, or of another release: it is done again
        return None


def _write(path: Path, compile_result: CompileResult) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(
            {"launches": [asdict(launch) for launch in compile_result.launches], "error": compile_result.error}, file
        )
    os.replace(file.name, path)


# -- the child --------------------------------------------------------------------------------------------------------


class StandInDriver:
    """What Triton's launch path asks a driver for until a kernel is compiled."""

    def __init__(self) -> None:
        self.target: Any = None

    def name_chip(self, architecture: str) -> None:
        """Says which chip is compiled for from now on."""
        from triton.backends.compiler import GPUTarget

        amd = architecture.startswith("gfx")
        self.target = (
            GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        )

    def get_current_target(self) -> Any:
        """The chip."""
        return self.target

    def get_current_device(self) -> int:
        """Always the first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Always the default one."""
        return 0


def _serve() -> None:
    """The child process: compiles what it is told to, and launches nothing."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from tritontower.kernels.runtime import config as configs
    from tritontower.kernels.runtime import dispatch
    from tritontower.tuning.operations import prepare

    device = StandInDriver()
    driver.set_active(device)
    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, compiled))
        return compiled

    JITFunction.run = record
    chip = ""
    # setattr, because these are functions of modules that nobody else may replace.
    setattr(configs, "architecture", lambda device: chip)  # noqa: B010
    setattr(dispatch, "backend_on", lambda device: "triton")  # noqa: B010
    seen: dict[str, dict[str, Any]] = {}

    def answer(order: Order) -> dict[str, Any]:
        nonlocal chip
        chip = order.architecture
        device.name_chip(chip)
        launched.clear()
        try:
            prepare(order.task, torch.device("cpu"), filled=False).run(dict(order.config))
            return {"error": None, "launches": [_facts(name, compiled, chip, seen) for name, compiled in launched]}
        except (OSError, MemoryError):  # the machine's fault, not the configuration's: the process ends
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
            return {"error": text, "launches": []}

    answer_orders(answer)


def _facts(name: str, compiled: Any, architecture: str, seen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if compiled.hash not in seen:
        warps = int(compiled.metadata.num_warps)
        seen[compiled.hash] = {"kernel": name, "num_warps": warps, **machine_facts(compiled, architecture, warps)}
    return seen[compiled.hash]
