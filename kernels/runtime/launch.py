"""The only place that launches kernels and calls torch's libraries on a GPU.

:func:`launch` runs a kernel through Triton's own launch path, and :func:`call_library` an operation of torch, such as a
matmul by cuBLAS or a copy.  Both take longer on the host than small kernels run.  A :class:`LaunchList` records them once
and repeats them without selecting, checking or converting anything.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch

from ._triton import triton


class Workspace:
    """Device memory for the temporary results of recorded operations, which use it in turn.

    Earlier launches use the earlier ``blocks``, which were too small for later ones.
    """

    def __init__(self) -> None:
        self.blocks: list[torch.Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns the first bytes of the last block; a larger one follows if they are too few."""
        size = math.prod(shape) * dtype.itemsize
        if not self.blocks or self.blocks[-1].numel() < size:
            self.blocks.append(torch.empty(size, dtype=torch.uint8, device=device))
        return self.blocks[-1][:size].view(dtype).view(*shape)


class LaunchList:
    """Launches and library calls over tensors that keep their addresses, in order and with their arguments bound.

    ``kernels`` are the names of the launched kernels; ``library_calls`` counts the others.  The tensors are kept alive.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.kernels: list[str] = []
        self.library_calls = 0
        # A function with what it takes before and after the stream; no stream: the function takes nothing.
        self._steps: list[tuple[Callable[..., Any], tuple[int, ...] | None, tuple[Any, ...]]] = []
        self._tensors: list[Any] = []

    def __len__(self) -> int:
        return len(self.kernels) + self.library_calls

    @contextmanager
    def record(self) -> Iterator[None]:
        """Runs the launches of this thread inside the block as usual, and appends them."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    def run(self) -> None:
        """Repeats the launches on the current device and stream.  Triton's launch hooks are not called."""
        stream = None
        for function, before, after in self._steps:
            if before is None:
                function()
                continue
            if stream is None:
                driver = triton.runtime.driver.active
                stream = driver.get_current_stream(driver.get_current_device())
            function(*before, stream, *after)

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launches ``kernel`` on the current device and appends the launch."""
        compiled = kernel[grid](*arguments, **options)
        self.kernels.append(kernel.fn.__name__)
        if not hasattr(compiled, "packed_metadata"):
            # Triton's interpreter, or a release whose compiled kernels have another interface.
            self._steps.append((partial(kernel[grid], *arguments, **options), None, ()))
            return
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        values = [named[name] for name in kernel.arg_names]
        self._tensors.append(values)
        # An address is bound faster than a tensor, for which the launcher calls `data_ptr` and asks the driver.
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        launcher = compiled.run
        if getattr(compiled.metadata, "global_scratch_size", 0):
            # The launcher takes memory from the allocator that is set in this context.
            launcher = partial(copy_context().run, launcher)
        # No metadata for hooks, no hook before the launch and none after it.
        after = (compiled.function, compiled.packed_metadata, None, None, None, *values)
        self._steps.append((launcher, (*grid, 1, 1)[:3], after))

    def call(self, function: Callable[[], Any]) -> None:
        """Calls an operation of torch and appends the call."""
        function()
        self.library_calls += 1
        self._steps.append((function, None, ()))


_recording: ContextVar[LaunchList | None] = ContextVar("tritontower_recording", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a jitted ``kernel`` on ``grid``; ``options`` are named arguments, warps and stages.

    Triton launches on the current device: that of the first tensor becomes it.
    """
    recording = _recording.get()
    if recording is not None:
        recording.launch(kernel, grid, arguments, options)
        return
    first = next(value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*arguments, **options)


def call_library(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Calls an operation of torch that writes to a tensor among its arguments."""
    recording = _recording.get()
    if recording is not None:
        recording.call(partial(function, *arguments, **options))
        return
    function(*arguments, **options)


def allocate_workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns uninitialized memory for a temporary result that the next launches of the same operation read.

    An operation has one at a time: the next call may return the same memory.
    """
    recording = _recording.get()
    if recording is not None:
        return recording.workspace.take(shape, dtype, device)
    return torch.empty(*shape, dtype=dtype, device=device)
