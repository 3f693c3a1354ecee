"""Recorded launches take microseconds of the host's time, through Triton's own launcher over a stand-in for the driver."""

import json

import pytest
from support.processes import run_python

from tritontower.kernels.runtime._triton import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_launches_and_replays_are_cheap_and_compile_once() -> None:
    # Repeated launches that compile fail the command.
    done = run_python("-m", "bench.host_overhead", "--family", "Qwen2-VL", "--patches", 1024, "--seconds", 0.1)
    assert done.returncode == 0, done.stderr[-2000:]
    ((row,),) = json.loads(done.stdout.splitlines()[-1]).values()
    assert row["patches"] == 1024
    assert 32 * 7 < row["launches"] < 32 * 11
    # Generous: the goals are 6 µs and 0.1 ms on a quiet machine.
    assert 0 < row["us_per_launch"] < 30
    assert 0 < row["replay_ms"] < min(2, row["eager_ms"])
