"""What a pass really takes, measured: the other side of :func:`tritontower.graph.memory_plan.plan_memory`."""

from collections.abc import Callable

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.engine.executor import Executor

__all__ = ["allocated_peak", "pass_peak"]


def allocated_peak(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator has given out at one time while ``call`` runs, beyond what it had before.

    On a GPU the allocator keeps count.  On a CPU it reports every allocation to torch's profiler, whose reports are added
    up; they are of all threads, so nothing else may run.  What libraries take from the system themselves is not in them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profiler = profile.profiler
    assert profiler is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += int(event.nbytes())
        most = max(most, held)
    return most


def pass_peak(executor: Executor, batch: PackedBatch) -> int:
    """What a pass over ``batch`` holds at once beside the weights, in bytes: :attr:`MemoryPlan.peak_bytes`, measured.

    The pass runs twice: the first time, whatever is made once and kept is made.

    Args:
        executor: what runs; its arena is given back.
        batch: on the executor's device, so that its own memory is not measured but added.
    """
    executor.run(batch)
    executor.release()
    taken = allocated_peak(lambda: executor.run(batch), executor.device)
    executor.release()
    inputs = (batch.tensors[name] for name in executor.graph.inputs)
    return taken + sum(int(tensor.nbytes) for tensor in inputs)
