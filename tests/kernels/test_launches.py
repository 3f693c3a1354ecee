"""Every public operation through Triton's real launch path: arguments bound, kernels specialized on them and compiled.

``test_ahead_of_time`` compiles what the kernel files *say* they launch; here it is what they launch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tritontower
from tritontower.kernels.attention import attention, pooling_head
from tritontower.kernels.gemm import linear, patch_projection, projector, qkv_projection
from tritontower.kernels.rowwise import activations, gather, mean_pool, norm, positions, rope, splice
from tritontower.kernels.runtime import dispatch

pytest.importorskip("triton", reason="launching needs Triton, which ships for Linux only")

LAUNCHERS = [
    pooling_head.launch_attention_pooling,
    activations.launch_activation,
    activations.launch_add,
    attention.launch_flash_attention,
    gather.launch_gather,
    linear.launch_linear,
    norm.launch_norm,
    patch_projection.launch_patch_projection,
    mean_pool.launch_mean_rows,
    positions.launch_rotary_table,
    projector.launch_projector,
    qkv_projection.launch_qkv_projection,
    rope.launch_rope,
    splice.launch_splice,
]


def launches(architecture: str, cases: str) -> list[dict[str, Any]]:
    """What ``support/launches.py`` found, in a process that does not interpret Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [Path(__file__).parents[1], Path(tritontower.__file__).resolve().parent.parent]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), environment.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-m", "support.launches", architecture, cases],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def failures(found: list[dict[str, Any]]) -> dict[str, str]:
    return {launch["case"]: launch["error"] for launch in found if "error" in launch}


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_every_boundary_launches(architecture):
    """Sizes of 1, odd strides, absent operands, every dtype, rows gigabytes apart."""
    found = launches(architecture, "boundaries")
    assert len(found) > 80
    assert not failures(found)


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_production_shapes_launch_without_spills(architecture):
    """The towers' shapes from 4 to 4096 patches: what is launched keeps the promise that the compiled table makes."""
    found = launches(architecture, "production")
    assert len(found) > 80
    assert not failures(found)
    if architecture == "sm_90":
        assert not [launch for launch in found if launch["spills"] or launch["stack"]]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_launchers_make_the_device_of_their_tensors_current(launcher, monkeypatch):
    """Triton launches on the current device, which need not be the tensors' own."""

    class Reached(Exception):
        pass

    def device_of(tensor: torch.Tensor) -> None:
        raise Reached(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first = torch.empty(0)
    with pytest.raises(Reached) as reached:
        launcher(first)
    assert reached.value.args[0] is first


def test_a_launcher_runs_inside_the_guard():
    seen = []
    dispatch.on_device_of_first(lambda first, second: seen.append((first, second)))(torch.empty(1), second=2)
    assert seen[0][1] == 2


@pytest.mark.parametrize("width", [1, 48, 80, 160, 192, 320, 384, 1152, 1280, 16384])
def test_rows_of_a_norm_are_a_power_of_two(width):
    rows = norm.default_config(width, "sm_90").rows
    assert rows >= 1
    assert rows & (rows - 1) == 0


def test_a_tensor_too_long_for_32_bits_is_walked_by_rows():
    """Counting the blocks of such a row rounds up past 2**31."""
    rows = 2**31 // 1280
    tensor = torch.empty(rows, 1280, dtype=torch.bfloat16, device="meta")
    assert 2**31 - 1024 < tensor.numel() < 2**31
    assert activations.flatten_rows(tensor) == (rows, 1280)
    assert activations.flatten_rows(tensor[:1000]) == (1, 1280 * 1000)
