"""Backend selection, with and without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import noise

from tritontower import VisionTower
from tritontower.kernels.rowwise.norm import norm
from tritontower.kernels.runtime import config, dispatch

CPU_TENSOR = torch.ones(2, 4)
ROOT = Path(__file__).parents[3]


def run_python(script: str, **environment: str) -> str:
    """Returns what ``script`` prints in a fresh process, without TRITON_INTERPRET unless ``environment`` has it."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_use_overrides_the_backend_of_its_block(kernel_device: torch.device) -> None:
    tensor = CPU_TENSOR.to(kernel_device)
    natural = dispatch.backend_for(tensor)
    assert natural in ("triton", "interpreter")
    assert dispatch.runs_kernel(tensor)
    with dispatch.use("reference"):
        assert not dispatch.runs_kernel(tensor)
        with dispatch.use(natural):
            assert dispatch.backend_for(tensor) == natural
        assert dispatch.backend_for(tensor) == "reference"
    assert dispatch.backend_for(tensor) == natural


def test_use_ends_after_an_error() -> None:
    before = dispatch.backend_for(CPU_TENSOR)
    with pytest.raises(ZeroDivisionError), dispatch.use("reference"):
        raise ZeroDivisionError
    assert dispatch.backend_for(CPU_TENSOR) == before


def test_backend_that_cannot_run_the_tensor_is_rejected() -> None:
    with dispatch.use("triton"), pytest.raises(RuntimeError, match=r"backend must be .* on cpu, got 'triton'"):
        norm(CPU_TENSOR, torch.ones(4), torch.zeros(4), kind="layer_norm", eps=1e-6)


BACKEND = (
    "import torch; from tritontower.kernels.runtime import dispatch; "
    "print(dispatch.backend_for(torch.ones(1)), dispatch.runs_kernel(torch.ones(1)))"
)


def test_environment_selects_the_interpreter_on_a_cpu() -> None:
    assert run_python(BACKEND) == "reference False"
    assert run_python(BACKEND, TRITON_INTERPRET="1") == "interpreter True"


def test_the_whole_tower_runs_without_triton(qwen2_vl: Path, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('not on this platform')")
    script = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.checkpoints import noise
from tritontower import VisionTower
rows = VisionTower.from_pretrained({str(qwen2_vl)!r}, device="cpu").encode(noise(90, 60, 1))[0].embeddings
torch.save(rows, {str(tmp_path / "rows.pt")!r})
"""
    run_python(script, PYTHONPATH=f"{tmp_path}:{ROOT}")
    expected = VisionTower.from_pretrained(qwen2_vl, device="cpu").encode(noise(90, 60, 1))[0].embeddings
    torch.testing.assert_close(torch.load(tmp_path / "rows.pt", weights_only=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sm_90", "sm_90"),
        ("sm_86", "sm_89"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_75", "sm_80"),
        ("gfx1100", "gfx942"),
        ("gfx90a", "gfx942"),
        ("gfx940", "gfx942"),
        ("interpreter", "interpreter"),
    ],
)
def test_unknown_chip_uses_the_nearest_architecture(name: str, nearest: str) -> None:
    assert config.nearest_architecture(name) == nearest
