"""Stand-ins for CUDA graphs where there is no GPU: what records the launches of a pass, and replays them."""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

__all__ = ["LaunchRecorder", "StepRecorder"]


class StepRecorder:
    """Runs the steps again: Python decides anew, over the same buffers.

    Attributes:
        captures: how often something was captured.
        replays: how often something was replayed.
        error: raised by the next captures.
        allocates: bytes that the next captures take from the pool, which lives as long as one of the replays.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.error: BaseException | None = None
        self.allocates = 1000
        self._pool_bytes = 0
        self._alive: WeakSet[Steps] = WeakSet()

    @property
    def held_bytes(self) -> int:
        return self._pool_bytes if self._alive else 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        return Steps(self, work)

    def _made(self, steps: "Steps") -> None:
        self._pool_bytes = self.held_bytes + steps.allocated
        self._alive.add(steps)


class Steps:
    def __init__(self, recorder: StepRecorder, work: Callable[[], None]) -> None:
        self.recorder, self.work, self.allocated = recorder, work, recorder.allocates
        recorder._made(self)

    def __call__(self) -> None:
        self.recorder.replays += 1
        self.work()


class LaunchRecorder(StepRecorder):
    """Repeats the very launches that were recorded, with the very arguments, as a CUDA graph does: no Python decides.

    Kernels are those of Triton's interpreter.  Of torch's own operations those that write are repeated; what they allocated
    while they were recorded is where the repeated ones write.
    """

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        tape: list[Callable[[], None]] = []
        launch = interpreter.GridExecutor.__call__

        def recorded(grid: Any, *arguments: Any, **options: Any) -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                launch(grid, *arguments, **options)
            tape.append(lambda: launch(grid, *arguments, **options))

        interpreter.GridExecutor.__call__ = recorded
        try:
            with _Tape(tape):
                work()
        finally:
            interpreter.GridExecutor.__call__ = launch
        return Steps(self, lambda: [repeat() for repeat in tape] and None)


class _Tape(TorchDispatchMode):
    def __init__(self, tape: list[Callable[[], None]]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        aliases = [value.alias_info for value in function._schema.returns if value.alias_info is not None]
        writes = any(alias.is_write for alias in aliases)
        if writes:
            self.tape.append(lambda: function(*arguments, **options))
        elif not aliases and "empty" not in function._schema.name and isinstance(result, torch.Tensor):
            self.tape.append(lambda: result.copy_(function(*arguments, **options)))
        return result
