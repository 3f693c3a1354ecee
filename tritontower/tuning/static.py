"""Static report: what the default configurations of all kernels compile to, without a GPU.

Triton includes its compilers, so the ``compile_specs`` of every kernel module can be compiled ahead of time for any
architecture and their machine code read.  A default that spills registers or misses the tensor cores is found here.

Command line: ``python -m tritontower.tuning.static --architecture sm_90 --kernel attention.attention`` prints the table;
``--write`` regenerates ``kernels/STATIC.md``.  Exit codes: 0 success, 1 a configuration breaks a rule, 2 bad usage.
"""

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tritontower.kernels
from tritontower.kernels.runtime.config import ARCHITECTURES, CompileSpec

from .compile.aot_compile import gpu_target
from .compile.compiled_kernel import CompiledKernel, read_compiled
from .compile.worker import Death, answer_orders, answers

CHILD = "from tritontower.tuning.static import serve; serve()"
"""Code of a child process."""

_PREFIX = "tritontower.kernels."

HEADER = """\
# What the default configurations compile to

Compiled ahead of time with Triton {triton}; nothing here was measured on hardware. Regenerate with
`python -m tritontower.tuning.static --write`; `tests/tuning/test_static.py` compares the table with the compiler.

Registers are per thread, shared memory in bytes per program. *Instructions per element* counts thread instructions of
the hot loop (attention: for each score; GEMM: for each output element and loop iteration), or of the whole program
if no loop has tensor-core instructions.
"""


@dataclass(frozen=True)
class StaticReport:
    """Result of compiling one :class:`CompileSpec` for one architecture."""

    kernel: str
    """Module of the kernel, such as ``"attention.fixed_max"``."""
    name: str
    architecture: str
    wants_tensor_core: bool
    elements: int
    compiled: CompiledKernel | None = None
    error: str | None = None
    """The compiler's message, or how its process ended."""

    @property
    def instructions_per_element(self) -> float | None:
        """Thread instructions for each element: of the hot loop if there is one, else of the whole program."""
        if self.compiled is None:
            return None
        loop = self.compiled.loop_instructions if self.wants_tensor_core else None
        length = self.compiled.instructions if loop is None else loop
        return length * self.compiled.computing_threads(self.architecture) / self.elements

    @property
    def problems(self) -> list[str]:
        """Rules that the configuration breaks; empty if it may ship."""
        if self.compiled is None:
            return [f"does not compile: {self.error}"]
        return self.compiled.problems(self.architecture, wants_tensor_core=self.wants_tensor_core)


def list_kernel_modules() -> list[str]:
    """Lists the kernel modules with compile specifications, such as ``"gemm.linear"``."""
    modules = pkgutil.walk_packages(tritontower.kernels.__path__, _PREFIX)
    names = sorted(module.name.removeprefix(_PREFIX) for module in modules if not module.ispkg)
    return [name for name in names if hasattr(importlib.import_module(_PREFIX + name), "compile_specs")]


def list_specs(architecture: str, kernels: Sequence[str] | None = None) -> list[CompileSpec]:
    """Lists the compile specifications of ``kernels`` (default: all kernel modules) for ``architecture``.

    Raises:
        ValueError: a kernel module of that name does not exist or has none.
    """
    available = list_kernel_modules()
    for name in kernels or ():
        if name not in available:
            raise ValueError(f"kernel must be one of {', '.join(available)}, got {name!r}")
    wanted = available if kernels is None else kernels
    return [
        spec for name in wanted for spec in importlib.import_module(_PREFIX + name).compile_specs(architecture)
    ]  # fmt: skip


def kernel_module(spec: CompileSpec) -> str:
    """Returns the module of the kernel that ``spec`` compiles, such as ``"gemm.linear"``."""
    return str(_function(spec).__module__).removeprefix(_PREFIX)


def compile_specs(specs: Iterable[CompileSpec], architecture: str, *, workers: int = 1) -> list[StaticReport]:
    """Compiles ``specs`` in ``workers`` child processes and returns a report on each, in order.

    A specification that does not compile, even one that aborts the compiler, only sets the ``error`` of its report.

    Raises:
        ValueError: ``architecture`` is not one of ``ARCHITECTURES``.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    reports = []
    orders = []
    for spec in specs:
        blank = StaticReport(kernel_module(spec), spec.name, architecture, spec.tensor_core, spec.elements)
        reports.append(blank)
        # A jitted function cannot be pickled; the child imports it by its name.
        portable = replace(spec, kernel=(_function(spec).__module__, _function(spec).__name__))
        orders.append((portable, architecture))
    for index, answer in answers(orders, CHILD, workers=workers):
        if isinstance(answer, Death):
            reports[index] = replace(reports[index], error=answer.reason)
        elif "error" in answer:
            reports[index] = replace(reports[index], error=answer["error"])
        else:
            reports[index] = replace(reports[index], compiled=CompiledKernel(**answer))
    return reports


def _function(spec: CompileSpec) -> Any:
    """Returns the Python function under ``@triton.jit``."""
    return getattr(spec.kernel, "fn", spec.kernel)


def serve() -> None:
    """Runs the child process."""

    def answer(order: tuple[CompileSpec, str]) -> dict[str, Any]:
        spec, architecture = order
        module, name = spec.kernel
        try:
            return asdict(_compile(replace(spec, kernel=getattr(importlib.import_module(module), name)), architecture))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")}

    answer_orders(answer)


def _compile(spec: CompileSpec, architecture: str) -> CompiledKernel:
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
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    compiled = triton_compile(source, target=gpu_target(architecture), options=options)
    return read_compiled(spec.kernel.fn.__name__, compiled, architecture, spec.num_warps)


def table(reports: Iterable[StaticReport]) -> str:
    """Formats the reports as a Markdown table, one line each."""
    lines = [
        "| architecture | kernel | configuration | registers | spills | shared memory | programs per SM "
        "| tensor-core instructions | instructions per element |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for report in reports:
        head, compiled = f"| {report.architecture} | {report.kernel} | {report.name} ", report.compiled
        if compiled is None:
            lines.append(f"{head}| {report.error} | | | | | |")
            continue
        opcodes = ", ".join(f"{count} {opcode}" for opcode, count in sorted(compiled.tensor_core.items())) or "–"
        lines.append(
            f"{head}| {compiled.registers} | {compiled.spills} | {compiled.shared_memory} | {compiled.occupancy} "
            f"| {opcodes} | {report.instructions_per_element:.2f} |"
        )
    return "\n".join(lines)


def document(reports: Sequence[StaticReport]) -> str:
    """Returns the text of ``kernels/STATIC.md``."""
    import triton

    return HEADER.format(triton=triton.__version__) + "\n" + table(reports) + "\n"


def document_path() -> Path:
    """Returns the path of ``kernels/STATIC.md``."""
    return Path(next(iter(tritontower.kernels.__path__))).resolve() / "STATIC.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tritontower.tuning.static",
        description="Compile the default kernel configurations without a GPU and show the results.",
        epilog="example: python -m tritontower.tuning.static --architecture sm_90 --kernel attention.attention",
    )
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="may be repeated; default: all")
    parser.add_argument("--kernel", action="append", help="a kernel module; may be repeated; default: all")
    parser.add_argument("--workers", type=int, default=1, help="compiler processes at the same time (default: 1)")
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
            for report in compile_specs(list_specs(architecture, options.kernel), architecture, workers=options.workers)
        ]
    except ValueError as error:
        parser.error(str(error))
    if options.write:
        document_path().write_text(document(reports), encoding="utf-8")
    print(json.dumps([asdict(report) for report in reports], indent=2) if options.json else table(reports))
    for report in reports:
        for problem in report.problems:
            print(f"{report.architecture} {report.kernel}: {report.name}: {problem}", file=sys.stderr)
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
