"""Static report: what the kernels that real towers launch compile to, without a GPU.

The towers of all families run at their published width over batches of several sizes, with uninitialized weights, under a
stand-in driver (:mod:`.compile.recording`).  Every launch is compiled for the architecture with the strides and sizes that
the tower has, and its machine code is read.

Command line: ``python -m tritontower.tuning.static --architecture sm_90 --model qwen2_vl`` prints the table; ``--write``
regenerates ``kernels/STATIC.md``.  Exit codes: 0 success, 1 a kernel breaks a rule, 2 bad usage.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

import tritontower.kernels
from tritontower.batch.layout import ImageLayout
from tritontower.batch.packed_batch import PackedBatch
from tritontower.benchmarks.documents import describe_error
from tritontower.benchmarks.images import truncate_depth
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig
from tritontower.engine.executor import Executor
from tritontower.engine.uint8_graph import make_uint8_graph
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import list_family_files, read_family

from .compile.compiled_kernel import CompiledKernel, read_compiled
from .compile.recording import Launch, Recorder, install_recorder
from .compile.worker import Death, answer_orders, answers

CHILD = "from tritontower.tuning.static import serve; serve()"
"""Code of a child process."""

PATCHES = (256, 1024, 4096, 16384)
"""Patches of one image; towers of a fixed image size get as many images as fit."""
MIXED = (64, 256, 1024)
"""Patches of the images of a mixed batch."""
BLOCKS = 2
"""Depth of the recorded towers: blocks repeat."""

MATMULS = re.compile(r"_(linear|partial|qkv_projection|patch_projection|attention_(?!pooling)\w+)_kernel")
"""Kernels that must use the tensor cores."""

KNOWN_SPILLS: dict[str, str] = {}
"""Kernels that spill as launched, with the reason."""

HEADER = """\
# What the launched kernels compile to

Recorded from towers of all families at their published width, with {patches} patches, mixed batches and uint8 pixels,
and compiled ahead of time with Triton {triton}; nothing here was measured on hardware. Regenerate with
`python -m tritontower.tuning.static --write`.

Registers are per thread, shared memory in bytes per program. *Instructions per element* counts thread instructions of the
hot loop: for each score (attention), or for each output element and loop iteration (GEMM).
"""


@dataclass(frozen=True)
class TowerRun:
    """One recorded forward pass of a published configuration."""

    model: str
    images: tuple[int, ...]
    """Patches of each image."""
    pixels: str = "float32"
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class KernelReport:
    """One distinct compiled kernel of an architecture, or a run that failed."""

    architecture: str
    kernel: str
    config: str = ""
    elements: int = 0
    """Elements that one iteration of its hot loop computes; 0 without such a loop."""
    models: tuple[str, ...] = ()
    """Published configurations that launch it."""
    compiled: CompiledKernel | None = None
    error: str | None = None
    """The compiler's message, or how its process ended."""

    @property
    def instructions_per_element(self) -> float | None:
        """Thread instructions of the hot loop for each element; ``None`` without such a loop."""
        if self.compiled is None or self.compiled.loop_instructions is None or not self.elements:
            return None
        return self.compiled.loop_instructions * self.compiled.computing_threads(self.architecture) / self.elements

    @property
    def problems(self) -> list[str]:
        """Rules that the kernel breaks; empty if it may ship."""
        if self.compiled is None:
            return [f"does not compile: {self.error}"]
        checked = replace(self.compiled, spills=0, stack=0) if self.kernel in KNOWN_SPILLS else self.compiled
        return checked.problems(self.architecture, wants_tensor_core=bool(MATMULS.fullmatch(self.kernel)))


@lru_cache
def list_models() -> tuple[str, ...]:
    """Lists the published configurations in transformers' format."""
    names = sorted({name for file in list_family_files().values() for name in file.PUBLISHED})
    return tuple(name for name in names if "model_type" in read_summary(name).example)


def list_runs(models: Sequence[str] | None = None) -> list[TowerRun]:
    """Lists the recorded forward passes: every size in float and uint8, and a mixed batch."""
    sizes = [*((count,) for count in PATCHES), MIXED]
    return [
        TowerRun(model, images, pixels)
        for model in models or list_models()
        for images, pixels in itertools.product(sizes, ("float32", "uint8"))
    ]


def compile_runs(runs: Iterable[TowerRun], architecture: str, *, workers: int = 1) -> list[KernelReport]:
    """Compiles what ``runs`` launch, in ``workers`` child processes; returns a report on each distinct kernel."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    by_model = [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.model)]
    found: dict[str, KernelReport] = {}
    failed = []
    for index, answer in answers([(group, architecture) for group in by_model], CHILD, workers=workers, seconds=900.0):
        model = by_model[index][0].model
        kernels, errors = ({}, [answer.reason]) if isinstance(answer, Death) else answer
        failed += [KernelReport(architecture, "?", models=(model,), error=error) for error in errors]
        for code, report in kernels.items():
            known = found.setdefault(code, report)
            found[code] = replace(known, models=tuple(sorted({*known.models, model})))
    return [*sorted(found.values(), key=lambda report: (report.kernel, report.config, report.models)), *failed]


def serve() -> None:
    """Runs the child process, which answers with the reports by digest of the code, and the errors."""
    recorder = install_recorder()

    def answer(order: tuple[list[TowerRun], str]) -> tuple[dict[str, KernelReport], list[str]]:
        runs, architecture = order
        kernels: dict[str, KernelReport] = {}
        errors = []
        for run in runs:
            try:
                for launch in record(run, recorder, architecture):
                    if launch.compiled.hash not in kernels:
                        kernels[launch.compiled.hash] = _describe(launch, architecture)
            except Exception as error:
                errors.append(f"{run}: {describe_error(error, 250)}")
        return kernels, errors

    answer_orders(answer)


def record(run: TowerRun, recorder: Recorder, architecture: str) -> list[Launch]:
    """Runs a tower with uninitialized weights and returns its launches."""
    recorder.start(architecture)
    values = truncate_depth(read_summary(run.model).example, BLOCKS)
    config = read_family(ConfigReader(values, run.model)).config
    graph = fold_still_images(fuse(build(config), select_passes(torch.device("cuda"))))
    if run.pixels == "uint8":
        graph = make_uint8_graph(graph, class_token=config.class_token)
    dtype = getattr(torch, run.dtype)
    sources = {name: torch.empty(shape, dtype=dtype) for name, shape in graph.held_shapes.items()}
    Executor(graph, sources).run(_make_batch(config, run))
    return list(recorder.launches)


def _make_batch(config: TowerConfig, run: TowerRun) -> PackedBatch:
    if config.num_patches is None:
        sides = [config.merge * max(1, round(count**0.5 / config.merge)) for count in run.images]
    else:
        sides = [round(config.num_patches**0.5)] * max(1, sum(run.images) // config.num_patches)
    layouts = [ImageLayout.of_one_tile((1, side, side), config.patch.size) for side in sides]
    pixels = torch.empty(sum(side * side for side in sides), config.patch.still_inner, dtype=getattr(torch, run.pixels))
    return PackedBatch.pack(
        config,
        pixels,
        layouts,
        original_sizes=[layout.processed_size for layout in layouts],
        content_hashes=[""] * len(layouts),
    )


def _describe(launch: Launch, architecture: str) -> KernelReport:
    constants, metadata = launch.constants, launch.compiled.metadata
    blocks = [
        constants[name]
        for name in ("BLOCK_QUERIES", "BLOCK_KEYS", "BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_INNER")
        if isinstance(constants.get(name), int)
    ]
    words = [" × ".join(map(str, blocks)), str(constants.get("ACTIVATION") or "")]
    words += [f"{metadata.num_warps} warps", f"{metadata.num_stages} stages"]
    return KernelReport(
        architecture,
        launch.kernel,
        ", ".join(word for word in words if word),
        blocks[0] * blocks[1] if len(blocks) > 1 else 0,
        compiled=read_compiled(launch, architecture),
    )


def table(reports: Iterable[KernelReport]) -> str:
    """Formats the reports as a Markdown table, one line each."""
    lines = [
        "| architecture | kernel | configuration | towers | registers | spills | shared memory | programs per SM "
        "| tensor-core instructions | instructions per element |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for report in reports:
        towers = ", ".join(report.models) if len(report.models) < 4 else f"{len(report.models)} families"
        kernel = report.kernel.removeprefix("_").removesuffix("_kernel")
        head, compiled = f"| {report.architecture} | {kernel} | {report.config} | {towers} ", report.compiled
        if compiled is None:
            lines.append(f"{head}| {report.error} | | | | | |")
            continue
        opcodes = ", ".join(f"{count} {opcode}" for opcode, count in sorted(compiled.tensor_core.items())) or "–"
        each = report.instructions_per_element
        lines.append(
            f"{head}| {compiled.registers} | {compiled.spills} | {compiled.shared_memory} | {compiled.occupancy} "
            f"| {opcodes} | {'–' if each is None else f'{each:.2f}'} |"
        )
    return "\n".join(lines)


def document(reports: Sequence[KernelReport]) -> str:
    """Returns the text of ``kernels/STATIC.md``."""
    import triton

    known = "\n".join(f"- `{name}` spills: {reason}." for name, reason in KNOWN_SPILLS.items())
    header = HEADER.format(triton=triton.__version__, patches=", ".join(f"{count:,}" for count in PATCHES))
    return f"{header}\n{known}\n\n{table(reports)}\n"


def document_path() -> Path:
    """Returns the path of ``kernels/STATIC.md``."""
    return Path(next(iter(tritontower.kernels.__path__))).resolve() / "STATIC.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tritontower.tuning.static",
        description="Compile what the towers launch, without a GPU, and show the results.",
        epilog="example: python -m tritontower.tuning.static --architecture sm_90 --model qwen2_vl",
    )
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="may be repeated; default: all")
    parser.add_argument(
        "--model", action="append", choices=list_models(), metavar="NAME", help="may be repeated; default: all"
    )
    parser.add_argument("--workers", type=int, default=1, help="compiler processes at the same time (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--write", action="store_true", help="rewrite kernels/STATIC.md (all models and architectures)")
    options = parser.parse_args(arguments)
    if options.write and (options.architecture or options.model):
        parser.error("--write regenerates the whole table; leave out --architecture and --model")
    reports = [
        report
        for architecture in options.architecture or ARCHITECTURES
        for report in compile_runs(list_runs(options.model), architecture, workers=options.workers)
    ]
    if options.write:
        document_path().write_text(document(reports), encoding="utf-8")
    print(json.dumps([asdict(report) for report in reports], indent=2) if options.json else table(reports))
    broken = [(report, problem) for report in reports for problem in report.problems]
    for report, problem in broken:
        print(f"{report.architecture} {report.kernel}, {report.config}: {problem}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    # Child processes unpickle the runs by the name of this module, which is ``__main__`` here.
    from tritontower.tuning import static

    sys.exit(static.main())
