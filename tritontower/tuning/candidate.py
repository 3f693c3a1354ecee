"""A configuration of a task and what is known of it, and the choice among them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .compile.aot_compile import CompileResult
from .tasks import Pairs, Task, make_pairs


@dataclass(frozen=True)
class Candidate:
    """One configuration of a task."""

    config: Mapping[str, Any]
    compile_result: CompileResult | None = None
    microseconds: float | None = None
    """Measured time of one launch."""
    error: float | None = None
    """Distance from the fp32 result, relative to its norm."""
    dropped: str = ""
    """Reason for which it may not be chosen; empty if it may."""

    @property
    def cost(self) -> float:
        """Measured microseconds; infinite for a candidate that was dropped or not measured."""
        return math.inf if self.dropped or self.microseconds is None else self.microseconds

    @property
    def identity(self) -> Pairs:
        """The configuration as a hashable value."""
        return make_pairs(**self.config)


@dataclass(frozen=True)
class Choice:
    """A task and the configuration chosen for it."""

    task: Task
    best: Candidate
    runner_up: Candidate | None
    default: Candidate
    dropped: Sequence[Candidate] = field(default=())

    @property
    def tflops(self) -> float | None:
        """Useful operations per second of the best, 10¹²; ``None`` for kernels without matmuls."""
        return self.task.flops / self.best.cost / 1e6 if self.task.flops else None

    @property
    def speedup(self) -> float | None:
        """Time of the default divided by the time of the best; ``None`` if the default was not measured."""
        return self.default.cost / self.best.cost if math.isfinite(self.default.cost) else None
