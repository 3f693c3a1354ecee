"""Two clocks, and the provenance of their figures.

:func:`interleaved` measures the wall time of whole forward passes, host work included, with candidates in turn.
:func:`time_on_device` measures how long one operation keeps a GPU busy, without the host's launch time.
"""

import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tritontower.devices import synchronize

CALLS_PER_GRAPH = 10
"""Calls in one captured graph, which share the cost of starting it."""

DRIVER_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock",
    "clocks.max.sm": "sm_clock_limit",
    "clocks.mem": "memory_clock",
    "power.limit": "power_limit",
    "temperature.gpu": "temperature",
}
"""Field of ``nvidia-smi`` → its name in a document."""


@dataclass(frozen=True)
class Timing:
    """Repeated times of one call, seconds.

    ``method`` is ``"clock"`` (wall time, host work included), ``"graph"`` or ``"events"`` (time on the GPU).
    """

    seconds: tuple[float, ...]
    method: str = "clock"

    @property
    def best(self) -> float:
        """The minimum: the time on an otherwise idle machine."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median: the time to expect on this machine."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles ÷ median."""
        if len(self.seconds) < 2 or not self.median:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Times every candidate ``repeats`` times in turn (A B C, A B C, …), after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(repeats + 1):
        for name, call in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}


def time_on_device(
    call: Callable[[], object],
    *,
    device: torch.device,
    budget_seconds: float = 0.2,
    least: int = 5,
    most: int = 50,
    graph: bool = True,
) -> Timing:
    """Measures how long ``call`` keeps ``device`` busy with cold caches.

    On a GPU the calls are captured into a CUDA graph, each after a kernel that fills the L2 cache; a second graph holds the
    fills alone, and the difference of both is the result.  It contains neither host time nor launch latency.  A single
    difference may be negative; their median must not.  A call that cannot be captured is timed between two events, which
    includes the first launch: compare such times only with others of the same :attr:`Timing.method`.  On a CPU the result
    is the wall time after reading more memory than the caches hold.

    ``call`` launches the same work on the current stream each time and should allocate nothing.  From ``least`` to ``most``
    samples are taken until ``budget_seconds`` have passed, the first call not counted.  A call that is too short to be
    measured raises :class:`RuntimeError`.
    """
    call()
    if device.type != "cuda":

        def after_eviction() -> float:
            _evict_from_cpu()
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return _samples(after_eviction, budget_seconds, least, most, "clock")
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        filler = torch.empty(_cache_bytes(device) // 4, dtype=torch.int32, device=device)
        if graph:
            try:
                busy = _captured(lambda: (filler.zero_(), call()))
                idle = _captured(lambda: filler.zero_())
            except RuntimeError:  # a call that waits for the device, or allocates beside the graph's pool
                torch.cuda.synchronize()
            else:

                def difference() -> float:
                    return (_between_events(busy.replay) - _between_events(idle.replay)) / CALLS_PER_GRAPH

                timing = _samples(difference, budget_seconds, least, most, "graph")
                # A kernel that takes no time would win every ranking.
                if timing.median <= 0:
                    raise RuntimeError(
                        f"the call must take longer than its launch, got a median of {timing.median * 1e6:.2f} µs over "
                        f"{len(timing.seconds)} differences; time one with more rows"
                    )
                return timing

        def after_fill() -> float:
            filler.zero_()
            return _between_events(call)

        return _samples(after_fill, budget_seconds, least, most, "events")


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, command, commit, versions and machine of a measurement."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": portable_command(sys.orig_argv),
        "commit": _commit(),
        "python": platform.python_version(),
        # With the build after the plus sign, which package metadata may omit.
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "transformers") if find_spec(name)},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_processors": properties.multi_processor_count,
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "ptxas": ptxas_version(10 * properties.major + properties.minor),
            **_query_driver(device),
        }
    return found


def portable_command(words: Sequence[str], folder: Path | None = None) -> str:
    """A command line without paths of this machine: relative to ``folder`` (the working directory), or a name alone."""
    folder = Path.cwd() if folder is None else folder

    def portable(word: str) -> str:
        option, separator, value = word.rpartition("=")
        path = Path(value)
        if not path.is_absolute():
            return word
        kept = path.relative_to(folder) if path.is_relative_to(folder) else path.name
        return f"{option}{separator}{kept}"

    return shlex.join(["python", *map(portable, words[1:])])


def _samples(sample: Callable[[], float], budget_seconds: float, least: int, most: int, method: str) -> Timing:
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < least or (len(seconds) < most and time.perf_counter() - start < budget_seconds):
        seconds.append(sample())
    return Timing(tuple(seconds), method)


def can_capture(device: torch.device) -> bool:
    """Tests whether ``device`` can capture CUDA graphs."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        number = torch.zeros(1, device=device)
        try:
            _captured(number.zero_)
        except RuntimeError:
            torch.cuda.synchronize()
            return False
    return True


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Captures :data:`CALLS_PER_GRAPH` calls, after one call outside, since libraries initialize on first use."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _between_events(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _cache_bytes(device: torch.device) -> int:
    """Bytes that evict everything else from the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 0
    return max(2 * int(cache), 64 * 2**20)


@lru_cache
def _cpu_filler() -> torch.Tensor:
    """More memory than the CPU's caches hold, as far as the system reports them."""
    cache = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KM])", path.read_text(encoding="ascii").strip())
        if size is not None:
            cache = max(cache, int(size[1]) * (2**10 if size[2] == "K" else 2**20))
    return torch.zeros(max(2 * cache, 64 * 2**20) // 4)


def _evict_from_cpu() -> None:
    """Reads the filler; writing it would leave write-backs to the timed call."""
    _cpu_filler().sum()


def _commit() -> str | None:
    """The commit of this checkout, with ``+`` if files differ from it; ``None`` outside a checkout.

    Untracked files count, results do not: a campaign writes them while it runs.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    # Optional locks could make a concurrent commit fail.
    status = ("git", "--no-optional-locks", "-C", str(root), "status", "--porcelain", "--untracked-files=normal")
    changed = _output(*status, "--", ".", ":(exclude)bench/results")
    return f"{commit}+" if commit and changed else commit


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _query_driver(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power limit and temperature of a GPU, if ``nvidia-smi`` is installed."""
    identity = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    index = torch.cuda.current_device() if device.index is None else device.index
    chosen = f"GPU-{identity}" if identity else str(index)
    line = _output("nvidia-smi", f"--id={chosen}", f"--query-gpu={','.join(DRIVER_FIELDS)}", "--format=csv,noheader")
    cells = line.splitlines()[0].split(", ") if line else []
    return dict(zip(DRIVER_FIELDS.values(), cells, strict=True)) if len(cells) == len(DRIVER_FIELDS) else {}


def ptxas_version(capability: int) -> str | None:
    """Version of the assembler that Triton uses for a compute capability (90 for 9.0)."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(capability).version)
    except (ImportError, TypeError, RuntimeError, AttributeError):  # the function differs between releases
        return None


def _output(*command: str) -> str | None:
    """Standard output of a command, stripped; ``None`` if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
