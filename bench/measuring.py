"""How things are measured here: interleaved, repeated, after a warm-up, with the machine written beside the figures."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["Timing", "interleaved", "provenance"]


@dataclass(frozen=True)
class Timing:
    """Wall times of one thing, seconds."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The least: what the code costs when nothing else runs."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median: what to expect on this machine as it was."""
        return statistics.median(self.seconds)


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Times every candidate ``repeats`` times in turn (A B C, A B C, …), so that a machine that drifts hits all alike.

    Each is called once beforehand, uncounted.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(repeats + 1):
        for name, call in candidates.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and when, with which versions: what a figure is worth nothing without."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
