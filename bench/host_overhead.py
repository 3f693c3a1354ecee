"""Measures the host's time for a forward pass on a GPU, without a GPU.

    python -m bench.host_overhead                          # Qwen2-VL and SigLIP on Hopper
    python -m bench.host_overhead --family CLIP --patches 1024

The executor runs a published tower with weights that are never read.  Triton compiles its kernels for sm_90 and launches
them through its own driver, over a stand-in for NVIDIA's library (compiled from :data:`LIBRARY` by the C compiler that Triton
needs anyway) whose calls return at once.  Tensors have no memory, so that copies return at once too.  So the time is that of
Python, torch and Triton's launcher; what the driver takes for each launch and each copy comes on top.

The last line is JSON, for each tower and number of patches: launches; microseconds per launch, repeated from the recorded
list; and milliseconds of a whole forward pass, launch by launch (``eager_ms``) and by a CUDA graph (``replay_ms``).
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.benchmarks.images import family_checkpoint, square_batch
from tritontower.engine.executor import Executor
from tritontower.engine.graph_cache import CaptureLimits, CudaGraphCache
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.kernels.runtime import config as configs
from tritontower.kernels.runtime import dispatch
from tritontower.text_table import text_table

ARCHITECTURE = "sm_90"
FAMILIES = ("Qwen2-VL", "SigLIP")
PATCHES = (256, 1024, 4096)

# Handles are any number but zero, and every limit of the chip is that of its shared memory, 228 KiB.
_NOTHING = """
    cuInit cuCtxSetCurrent cuFuncSetCacheConfig cuFuncSetAttribute cuLaunchKernel cuLaunchKernelEx cuTensorMapEncodeTiled
    cuTensorMapEncodeIm2col cuGetErrorString cuCtxSetLimit cuStreamIsCapturing cuModuleUnload
"""
_NUMBER = (
    "cuCtxGetDevice cuDeviceGet cuDeviceGetAttribute cuFuncGetAttribute cuDriverGetVersion cuOccupancyMaxActiveClusters"
)
_HANDLE = "cuCtxGetCurrent cuDevicePrimaryCtxRetain cuModuleLoadData cuModuleGetFunction cuCtxGetLimit"
LIBRARY = "\n".join(
    (
        *(f"int {name}() {{ return 0; }}" for name in _NOTHING.split()),
        *(f"int {name}(int *number) {{ *number = 228 << 10; return 0; }}" for name in _NUMBER.split()),
        *(f"int {name}(long *handle) {{ *handle = 1; return 0; }}" for name in _HANDLE.split()),
        "int cuPointerGetAttribute(long *address, int kind, long pointer) { *address = pointer; return 0; }",
    )
)
"""C source of the stand-in for ``libcuda.so.1``."""


def install_driver(folder: Path) -> None:
    """Makes Triton launch for :data:`ARCHITECTURE` through the stand-in, for the rest of this process."""
    source, library = folder / "library.c", folder / "libcuda.so.1"
    source.write_text(LIBRARY)
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True
    )
    # Triton's extension finds a library of this name that is already there.
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    class StandIn(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", int(ARCHITECTURE.removeprefix("sm_")), 32)

    driver.set_active(StandIn())


def make_executor(tower: VisionTower) -> Executor:
    """Makes an executor with static buffers; its tensors have no memory, so that copies return at once, as on a GPU."""
    graph = fold_still_images(fuse(build(tower.config), select_passes(torch.device("cuda"))))
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in graph.held_shapes.items()
    }
    executor = Executor(graph, weights)
    executor.graph_cache = CudaGraphCache(graph, executor.dtype, executor.device, None, CaptureLimits())
    return executor


def measure(function: Callable[[], object], seconds: float) -> float:
    """Returns the least time of a call, in seconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def measure_batch(executor: Executor, batch: PackedBatch, seconds: float) -> dict[str, float]:
    """Measures forward passes of one batch; the first one compiles, the second one must not."""
    from triton import knobs

    assert executor.graph_cache is not None
    executor.run(batch)
    buffers = list(executor.graph_cache.buffers.values())[-1]
    launches = buffers.launches
    assert launches is not None
    compiled: list[str] = []
    knobs.runtime.jit_cache_hook = lambda **options: compiled.append(options["repr"])
    launching, eager = measure(launches.run, seconds), measure(lambda: executor.run(batch), seconds)
    buffers.replay = lambda: None
    replay = measure(lambda: executor.run(batch), seconds)
    buffers.replay = None  # another batch may have the same buffers
    if compiled:
        raise RuntimeError(f"launches must be compiled once, got {len(compiled)} more: {compiled}")
    count = len(launches)
    return {
        "patches": batch.workload.patches,
        "launches": count,
        "us_per_launch": 1e6 * launching / count,
        "eager_ms": 1e3 * eager,
        "replay_ms": 1e3 * replay,
    }


def main(words: list[str] | None = None) -> int:
    """Prints a table, and the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", metavar="TITLE", help="as listed by `tritontower families`")
    parser.add_argument("--patches", type=int, action="append", metavar="N", help="about so many patches in a batch")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each measurement")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {}
    with TemporaryDirectory() as folder:
        install_driver(Path(folder))
        for title in arguments.family or FAMILIES:
            with family_checkpoint(title) as path:
                tower = VisionTower.from_pretrained(path, device="cpu", dtype="bfloat16", delay_load=True)
                batches = [square_batch(tower, patches) for patches in arguments.patches or PATCHES]
                # Two may be the same one image, if its size is fixed.
                distinct = {batch.workload: replace(batch, pixels=batch.pixels.to(torch.uint8)) for batch in batches}
                with dispatch.use("triton"), configs.assume(ARCHITECTURE):
                    executor = make_executor(tower)
                    found[title] = [measure_batch(executor, each, arguments.seconds) for each in distinct.values()]
    rows = [
        (title, f"{row['patches']:,}", row["launches"], *(f"{row[name]:.3f}" for name in list(row)[2:]))
        for title, measured in found.items()
        for row in measured
    ]
    columns = ("tower", "patches", "launches", "µs per launch", "eager, ms", "replay, ms")
    print(text_table(f"Host time of forward passes for {ARCHITECTURE}, without the driver's calls", columns, rows))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
