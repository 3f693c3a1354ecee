"""What a kernel compiles to, read without a GPU: registers, spills, shared memory, occupancy, tensor-core instructions.

Triton carries its compilers with it, so the shipped launch configurations (``compile_specs`` of every kernel file) can
be compiled ahead of time for any chip and their machine code read.  A configuration that spills registers or misses
the tensor cores is found here, before anybody meets it on hardware.

Compilation runs in child processes, for two reasons: a failed assertion inside the compiler ends its process, and a
parent that *interprets* Triton (``TRITON_INTERPRET=1``) cannot compile in the same process.

Command line: ``python -m tritontower.tuning.static --architecture sm_90 --kernel flash_attention`` prints the table;
``--write`` regenerates ``kernels/STATIC.md``.  Exit codes: 0 all is well, 1 a configuration breaks a rule, 2 bad usage.
"""

import argparse
import importlib
import importlib.util
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tritontower.kernels
from tritontower.kernels.runtime.config import ARCHITECTURES, SHARED_MEMORY_LIMIT, CompileSpec

from .compile.disassembly import MachineCode, hot_loop, read_amd, read_nvidia
from .compile.worker import Death, answer_orders, answers
from .predict import Compiled, attention_time, product_time

__all__ = [
    "StaticReport",
    "compile_ahead",
    "compile_each",
    "compiled_facts",
    "compiled_facts_of",
    "discover",
    "document",
    "document_path",
    "kernel_modules",
    "kernel_name",
    "machine_facts",
    "main",
    "problems",
    "table",
]

TENSOR_CORE_PREFIX = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTC",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
"""How the instructions begin that use a chip's tensor cores as they are meant to be used."""

_CHILD = "from tritontower.tuning.static import _serve; _serve()"


@dataclass(frozen=True)
class StaticReport:
    """What one :class:`CompileSpec` became on one architecture."""

    kernel: str
    """The kernel file, e.g. ``"attention"``."""
    name: str
    architecture: str
    triton: str
    """Version of the compiler."""
    wants_tensor_core: bool
    num_warps: int
    threads: int = 0
    """Of one program.  More than ``num_warps`` says where warps of their own fetch the data."""
    registers: int = 0
    """Per thread; on AMD vector registers, accumulation registers included."""
    spills: int = 0
    """Instructions that move registers to and from local memory (on AMD: registers so moved)."""
    stack: int = 0
    """Bytes of local memory per thread."""
    shared_memory: int = 0
    """Bytes per program."""
    occupancy: int = 0
    """Programs that fit one multiprocessor at the same time."""
    tensor_core: dict[str, int] = field(default_factory=dict)
    """Opcode → how often it stands in the code."""
    instructions: int = 0
    loop_instructions: int | None = None
    """Length of the hot loop: the innermost one with tensor-core instructions."""
    instructions_per_element: float | None = None
    """Thread instructions for each element: of the hot loop where there is one, else of the whole program."""
    predicted_tflops: float | None = None
    """What a large product or attention should reach (:mod:`.predict`); nothing was measured."""
    error: str | None = None
    """Why there is nothing to report: the compiler's message, or how it died."""


def kernel_modules() -> list[str]:
    """The kernel files that list compile specifications, by module name without the package."""
    prefix = "tritontower.kernels."
    modules = pkgutil.walk_packages(tritontower.kernels.__path__, prefix)
    names = sorted(module.name.removeprefix(prefix) for module in modules if not module.ispkg)
    return [name.rpartition(".")[2] for name in names if hasattr(_kernel_module(name), "compile_specs")]


def discover(architecture: str, kernels: Sequence[str] | None = None) -> list[CompileSpec]:
    """The compile specifications of ``kernels`` (all kernel files by default) for ``architecture``.

    Raises:
        ValueError: a kernel file of that name does not exist or lists none.
    """
    available = kernel_modules()
    unknown = [name for name in kernels or () if name not in available]
    if unknown:
        raise ValueError(
            f"no kernel file {unknown[0]!r} lists compile specifications; there are {', '.join(available)}"
        )
    wanted = available if kernels is None else kernels
    return [spec for name in wanted for spec in _kernel_module(name).compile_specs(architecture)]


def compile_ahead(specs: Iterable[CompileSpec], architecture: str, *, workers: int = 1) -> list[StaticReport]:
    """Compiles ``specs`` for ``architecture`` in ``workers`` child processes and reports on each, in order.

    Never raises for a specification that fails to compile, not even when it takes the compiler down with it: its
    report carries the ``error``.

    Raises:
        ValueError: ``architecture`` is not one of ``configs.ARCHITECTURES``.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    todo = list(specs)
    reports: list[StaticReport | None] = [None] * len(todo)
    for index, report in compile_each(todo, architecture, workers=workers):
        reports[index] = report
    return [report for report in reports if report is not None]


def compile_each(
    specs: Sequence[CompileSpec], architecture: str, *, workers: int = 1
) -> Iterator[tuple[int, StaticReport]]:
    """As :func:`compile_ahead`, but yields each report with its index in ``specs`` as soon as it is there.

    Closing the iterator ends the child processes.
    """
    portable = [
        replace(spec, kernel=(_function(spec.kernel).__module__, _function(spec.kernel).__name__)) for spec in specs
    ]
    for index, answer in answers([(spec, architecture) for spec in portable], _CHILD, workers=workers):
        if isinstance(answer, Death):
            yield index, _blank(specs[index], architecture, error=answer.reason)
        else:
            yield index, StaticReport(**answer)


def problems(report: StaticReport) -> list[str]:
    """The rules that a report breaks, as sentences; empty when the configuration may ship."""
    if report.error is not None:
        return [f"does not compile: {report.error}"]
    broken = []
    if report.spills or report.stack:
        broken.append(f"spills registers ({report.spills} instructions, {report.stack} bytes of stack)")
    limit = SHARED_MEMORY_LIMIT[report.architecture]
    if report.shared_memory > limit:
        broken.append(f"takes {report.shared_memory} bytes of shared memory, the limit is {limit}")
    prefix = TENSOR_CORE_PREFIX[report.architecture]
    if report.wants_tensor_core and not any(opcode.startswith(prefix) for opcode in report.tensor_core):
        broken.append(f"has no {prefix} instruction")
    return broken


def table(reports: Iterable[StaticReport]) -> str:
    """The reports as a Markdown table, one line each, in the order given."""
    lines = [
        "| architecture | kernel | configuration | registers | spills | shared memory | programs per SM "
        "| tensor-core instructions | instructions per element | predicted TFLOP/s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for report in reports:
        head = f"| {report.architecture} | {report.kernel} | {report.name} "
        if report.error is not None:
            lines.append(f"{head}| {report.error} | | | | | | |")
            continue
        opcodes = ", ".join(f"{count} {opcode}" for opcode, count in sorted(report.tensor_core.items())) or "–"
        per_element = "–" if report.instructions_per_element is None else f"{report.instructions_per_element:.2f}"
        predicted = "–" if report.predicted_tflops is None else f"{report.predicted_tflops:.0f}"
        lines.append(
            f"{head}| {report.registers} | {report.spills} | {report.shared_memory} | {report.occupancy} "
            f"| {opcodes} | {per_element} | {predicted} |"
        )
    return "\n".join(lines)


def _kernel_module(name: str) -> Any:
    if "." not in name:
        name = next(
            p
            for p in (f"{d}.{name}" for d in ("attention", "gemm", "rowwise", "runtime"))
            if importlib.util.find_spec(f"tritontower.kernels.{p}")
        )
    return importlib.import_module(f"tritontower.kernels.{name}")


def kernel_name(spec: CompileSpec) -> str:
    """The kernel file of ``spec``, e.g. ``"attention"``."""
    return str(_function(spec.kernel).__module__).rpartition(".")[2]


def _function(kernel: Any) -> Any:
    """The Python function under ``@triton.jit``, compiled or interpreted."""
    return getattr(kernel, "fn", kernel)


def _serve() -> None:
    """The child process."""
    answer_orders(lambda order: asdict(_report(*order)))


def _report(spec: CompileSpec, architecture: str) -> StaticReport:
    """The report on one specification, whatever becomes of it."""
    module, name = spec.kernel
    loaded = replace(spec, kernel=getattr(importlib.import_module(module), name))
    try:
        return _compile(loaded, architecture)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
        return _blank(loaded, architecture, error=text)


def _blank(spec: CompileSpec, architecture: str, error: str | None = None) -> StaticReport:
    import triton

    return StaticReport(
        kernel=kernel_name(spec),
        name=spec.name,
        architecture=architecture,
        triton=triton.__version__,
        wants_tensor_core=spec.tensor_core,
        num_warps=spec.num_warps,
        error=error,
    )


def _compile(spec: CompileSpec, architecture: str) -> StaticReport:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    arguments = spec.kernel.arg_names
    signature = {name: "constexpr" if name in spec.constants else spec.signature[name] for name in arguments}
    divisible = [
        index
        for index, name in enumerate(arguments)
        if name not in spec.constants and (signature[name].startswith("*") or name in spec.divisible_by_16)
    ]
    source = ASTSource(
        spec.kernel,
        signature,
        constexprs=dict(spec.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    compiled = triton_compile(source, target=target, options=options)
    report = replace(_blank(spec, architecture), **machine_facts(compiled, architecture, spec.num_warps))
    loop = report.loop_instructions if spec.tensor_core else None
    length = report.instructions if loop is None else loop
    working = _working(report.threads, spec.num_warps * target.warp_size)
    report = replace(report, loop_instructions=loop, instructions_per_element=length * working / spec.elements)
    return replace(report, predicted_tflops=_predicted(spec, report))


def machine_facts(compiled: Any, architecture: str, num_warps: int) -> dict[str, Any]:
    """The fields of a :class:`StaticReport` that are read from what Triton compiled."""
    amd = architecture.startswith("gfx")
    code = read_amd(compiled.asm["amdgcn"]) if amd else read_nvidia(compiled.asm["cubin"])
    shared_memory = int(compiled.metadata.shared)
    threads = num_warps * 64 if amd else _threads(compiled.asm["ptx"], num_warps)
    return {
        "threads": threads,
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared_memory": shared_memory,
        "occupancy": _occupancy(code, shared_memory, threads // (64 if amd else 32), architecture),
        "tensor_core": code.tensor_core,
        "instructions": len(code.instructions),
        "loop_instructions": hot_loop(code.instructions),
    }


def _threads(assembly: str, num_warps: int) -> int:
    """Threads that a program is launched with: the compiler may add warps that fetch data to those that were asked for."""
    found = re.search(r"\.reqntid\s+(\d+)", assembly)
    return int(found[1]) if found else num_warps * 32


def _working(threads: int, asked_for: int) -> int:
    """The threads that compute: a specialized program has four warps more than those, which fetch what they need."""
    return threads if threads <= asked_for else max(asked_for, threads - 128)


def compiled_facts(report: StaticReport) -> Compiled:
    """What the model of :mod:`.predict` takes of a report without an ``error``."""
    return compiled_facts_of(
        report.architecture,
        report.threads,
        report.num_warps,
        report.occupancy,
        report.instructions,
        report.loop_instructions,
    )


def compiled_facts_of(
    architecture: str, threads: int, num_warps: int, occupancy: int, instructions: int, loop_instructions: int | None
) -> Compiled:
    """The same of the single figures."""
    warp = 64 if architecture.startswith("gfx") else 32
    loop = loop_instructions or 0
    return Compiled(threads, _working(threads, num_warps * warp), max(1, occupancy), loop, instructions - loop)


LARGE_ROWS, LARGE_COLUMNS, LARGE_INNER, LARGE_HEADS = 16384, 5120, 1280, 16
"""For what the table's predictions are: a product and an attention that fill any chip."""


def _predicted(spec: CompileSpec, report: StaticReport) -> float | None:
    """TFLOP/s of a large product or attention launched like this; ``None`` for anything else."""
    constants, facts = spec.constants, compiled_facts(report)
    if not spec.tensor_core or report.loop_instructions is None:
        return None
    if {"BLOCK_QUERIES", "BLOCK_KEYS", "HEAD_DIM", "MAIN"} <= constants.keys():
        return attention_time(
            report.architecture,
            facts,
            rows=LARGE_ROWS,
            length=LARGE_ROWS,
            heads=LARGE_HEADS,
            head_dim=constants["HEAD_DIM"],
            computed_dim=constants["MAIN"] + constants.get("TAIL", 0),
            block_queries=constants["BLOCK_QUERIES"],
            block_keys=constants["BLOCK_KEYS"],
        ).tflops
    if {"BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_INNER"} <= constants.keys():
        gated = "gated" in str(constants.get("ACTIVATION"))
        return product_time(
            report.architecture,
            facts,
            rows=LARGE_ROWS,
            columns=LARGE_COLUMNS,
            inner=LARGE_INNER,
            block_rows=constants["BLOCK_ROWS"],
            block_columns=constants["BLOCK_COLUMNS"],
            block_inner=constants["BLOCK_INNER"],
            factors=2 if gated else 1,
        ).tflops
    return None


def _occupancy(code: MachineCode, shared_memory: int, num_warps: int, architecture: str) -> int:
    """Programs at once on one multiprocessor, by registers, shared memory and warps (CUDA and CDNA 3 manuals)."""
    if architecture.startswith("gfx"):
        # Four SIMDs of 512 vector registers per lane (given out in eights) and at most 8 waves each.
        waves = 4 * min(8, 512 // max(8, -(-code.registers // 8) * 8))
        by_memory = SHARED_MEMORY_LIMIT[architecture] // max(1, shared_memory)
        return min(waves // num_warps, by_memory)
    capacity = {"sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_100": 228}[architecture] * 1024
    warps = 48 if architecture == "sm_89" else 64
    registers_per_warp = -(-code.registers * 32 // 256) * 256
    # The system keeps 1 KB of shared memory for each program.
    return min(65536 // (registers_per_warp * num_warps), capacity // (shared_memory + 1024), warps // num_warps, 32)


HEADER = """\
# What the shipped configurations compile to

Compiled ahead of time with Triton {triton}; nothing here was measured on hardware. Regenerate with
`python -m tritontower.tuning.static --write`; `tests/tuning/test_aot_compile.py` keeps the table honest.

Registers are per thread, shared memory in bytes per program. *Instructions per element* counts thread instructions of
the hot loop (attention: for each score; GEMM: for each output element and loop iteration), or of the whole program
where no loop feeds the tensor cores. *Predicted TFLOP/s* are what the model in `tritontower/tuning/predict.py` makes of
that for a product of 16 384 × 5120 × 1280, or for attention of 16 heads over one segment of 16 384 rows, on one chip of
the architecture.
"""


def document(reports: Sequence[StaticReport]) -> str:
    """The text of ``kernels/STATIC.md``."""
    return HEADER.format(triton=reports[0].triton) + "\n" + table(reports) + "\n"


def document_path() -> Path:
    """Where the repository keeps that table."""
    return Path(next(iter(tritontower.kernels.__path__))).resolve() / "STATIC.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tritontower.tuning.static",
        description="Compile the shipped kernel configurations without a GPU and show what became of them.",
        epilog="example: python -m tritontower.tuning.static --architecture sm_90 --kernel flash_attention",
    )
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="may be repeated; default: all")
    parser.add_argument(
        "--kernel", action="append", help="a file of kernels/ without .py; may be repeated; default: all"
    )
    parser.add_argument("--workers", type=int, default=1, help="compiler processes at once (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--write", action="store_true", help="rewrite kernels/STATIC.md (all kernels, all architectures)"
    )
    options = parser.parse_args(arguments)
    if options.write and (options.architecture or options.kernel):
        parser.error("--write regenerates the whole table; leave out --architecture and --kernel")
    try:
        reports = [
            report
            for architecture in options.architecture or ARCHITECTURES
            for report in compile_ahead(discover(architecture, options.kernel), architecture, workers=options.workers)
        ]
    except ValueError as error:
        parser.error(str(error))
    if options.write:
        document_path().write_text(document(reports), encoding="utf-8")
    print(json.dumps([asdict(report) for report in reports], indent=2) if options.json else table(reports))
    broken = [(report, problem) for report in reports for problem in problems(report)]
    for report, problem in broken:
        print(f"{report.architecture} {report.kernel}: {report.name}: {problem}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
