"""Recorded launches repeat what they did, through the handles of compiled kernels, whatever thread records or repeats."""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tritontower.kernels.gemm.linear import linear
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.rowwise.activations import add
from tritontower.kernels.runtime import launch as launching
from tritontower.kernels.runtime.launch import LaunchList, Workspace, launch

SPLIT = LinearConfig(16, 16, 32, group_rows=2, num_warps=4, num_stages=1, split=3)


def two_layers(x: torch.Tensor, out: torch.Tensor, config: LinearConfig) -> None:
    """Both layers take a temporary result: partial sums, or a matmul before an activation and a residual."""
    weight = torch.linspace(-1, 1, 96 * 96).view(96, 96)
    linear(x, weight, weight[0], activation="silu", residual=out, out=out, config=config)
    linear(x, weight[:40], activation="silu", residual=out[:, :40], out=out[:, :40], config=config)


@pytest.mark.parametrize("config", [SPLIT, replace(SPLIT, vendor=True)], ids=["split", "vendor"])
def test_a_list_repeats_launches_with_new_contents(config: LinearConfig, kernel_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, start = (torch.randn(20, 96, generator=generator) for _ in range(3))
    expected = start.clone()
    two_layers(second, expected, config)
    x, out = first.clone(), start.clone()
    workspace = Workspace()
    launches = LaunchList(workspace)
    with launches.record():
        two_layers(x, out, config)
    assert (len(launches.kernels), launches.library_calls) == ((4, 2) if config.vendor else (4, 0))
    x.copy_(second)
    out.copy_(start)
    for block in workspace.blocks:
        block.fill_(255)
    launches.run()
    assert torch.equal(out, expected)
    assert len(workspace.blocks) == 1  # the smaller layer uses the memory of the larger one


def test_only_the_recording_thread_is_recorded(kernel_device: torch.device) -> None:
    x = torch.ones(3, 16)
    launches = LaunchList(Workspace())
    with launches.record():
        other = threading.Thread(target=add, args=(x, x))
        other.start()
        other.join()
        assert launches.kernels == []
        add(x, x)
    add(x, x)
    assert len(launches.kernels) == 1


class CompiledKernel:
    """A jitted kernel that is compiled, as Triton 3.6 to 3.9 return it; records what its launcher gets."""

    arg_names = ("x_ptr", "y_ptr", "rows", "BLOCK")
    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self, scratch: int = 0) -> None:
        self.fn = SimpleNamespace(__name__="fake_kernel")
        self.metadata = SimpleNamespace(global_scratch_size=scratch)
        self.launched: list[tuple[Any, ...]] = []
        self.selected = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def select(*arguments: Any, **options: Any) -> "CompiledKernel":
            self.selected += 1
            return self

        return select

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.mark.parametrize("scratch", [0, 64])
def test_repeated_launches_use_the_compiled_handle(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(get_current_device=lambda: 2, get_current_stream=lambda device: 100 + device)
    monkeypatch.setattr(launching, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    driver.active = driver
    kernel, x = CompiledKernel(scratch), torch.zeros(4)
    launches = LaunchList(Workspace())
    with launches.record():
        launch(kernel, (5, 2), x, None, BLOCK=16, rows=4, num_warps=8)
    launches.run()
    launches.run()
    expected = (5, 2, 1, 102, 11, (4, 1, 0), None, None, None, x.data_ptr(), None, 4, 16)
    assert kernel.launched == [expected] * 2
    assert kernel.selected == 1
