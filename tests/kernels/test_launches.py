"""Every public operation through Triton's real launch path: arguments are bound, kernels specialized and compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tritontower
from tritontower.kernels.rowwise import activations
from tritontower.kernels.runtime.launch import launch

pytest.importorskip("triton", reason="launching needs Triton, which ships for Linux only")


def run_launches(architecture: str) -> list[dict[str, Any]]:
    """Runs ``support/launches.py`` in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [Path(__file__).parents[1], Path(tritontower.__file__).resolve().parent.parent]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), environment.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-m", "support.launches", architecture],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_every_boundary_launches(architecture):
    found = run_launches(architecture)
    assert {launch["case"]: launch["error"] for launch in found if "error" in launch} == {}
    assert len(found) > 80
    # One warp normalizes a row of usual width; wider rows take several, which must wait for each other.
    waits = {launch["case"]: launch["has_barrier"] for launch in found if launch["kernel"] == "_norm_kernel"}
    assert not any(waits[case] for case in ("norm torch.bfloat16", "norm torch.float32", "norm gathered"))
    assert waits["norm of 16384"]


def test_launches_select_the_device_of_their_first_tensor(monkeypatch):
    # Triton launches on the current device, which may not be that of the tensors.
    class Reached(Exception):
        pass

    def device_of(tensor: torch.Tensor) -> None:
        raise Reached(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first, second = torch.zeros(1), torch.zeros(1)
    for arguments, options in (((1, first, second), {}), ((), {"x_ptr": first, "rows": 1, "out_ptr": second})):
        with pytest.raises(Reached) as reached:
            launch(None, (1,), *arguments, **options)
        assert reached.value.args[0] is first


def test_tensors_near_2_to_the_31_elements_use_row_strides():
    # The number of blocks of such a row, rounded up, exceeds 2**31.
    rows = 2**31 // 1280
    tensor = torch.empty(rows, 1280, dtype=torch.bfloat16, device="meta")
    assert 2**31 - 1024 < tensor.numel() < 2**31
    assert activations.flatten_rows(tensor) == (rows, 1280)
    assert activations.flatten_rows(tensor[:1000]) == (1, 1280 * 1000)
