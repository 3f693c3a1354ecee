"""The benchmark's own cases: their numbers against the formula on every backend, and that wrong ones are not timed."""

from dataclasses import replace

import pytest
import torch

from tritontower.benchmarks import cases as grid
from tritontower.benchmarks import kernels as benchmark
from tritontower.benchmarks.cases import KERNELS, Case, Prepared, check
from tritontower.benchmarks.roofline import PUBLISHED, Roofline, published_roofline

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32]


def identity(case: Case) -> str:
    return f"{case.kernel}: {case.label}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.usefixtures("poisoned_empty")
def test_small_cases(device, kernel, dtype):
    """Kernel and reference, at sizes that the interpreter can do."""
    for case in grid.cases("small", dtype, [kernel]):
        outcome = check(case, case.prepare(device), device)
        assert outcome.passed, (identity(case), outcome)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(grid.cases("gpu")), ids=identity)
def test_production_cases(kernel_device, case):
    outcome = check(case, case.prepare(kernel_device), kernel_device)
    assert outcome.passed, outcome


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_result_is_seen(monkeypatch, kernel):
    """Half a percent off in one row out of seventy is more than any of the limits allows."""
    (case, *_) = grid.cases("small", torch.float32, [kernel])
    prepared = case.prepare(CPU)

    def spoilt() -> torch.Tensor:
        result = prepared.result().clone()
        result[7 % len(result)] *= 1.005
        return result

    assert check(case, prepared, CPU).passed
    assert not check(case, replace(case.prepare(CPU), result=spoilt), CPU).passed


def test_what_is_wrong_or_fails_is_not_timed(monkeypatch):
    monkeypatch.setattr(benchmark, "time_on_device", lambda *_, **__: pytest.fail("was timed"))
    (case,) = list(grid.cases("small", torch.float32, ["rope"]))[:1]
    good = case.prepare(CPU)

    def broken(error: Exception | None) -> Prepared:
        def call() -> None:
            if error is not None:
                raise error

        return replace(good, call=call)

    class OutOfResourcesError(Exception):  # as Triton's own: of no kind but its own
        pass

    for error in (None, RuntimeError("no such launch"), OutOfResourcesError("shared memory")):
        monkeypatch.setattr(Case, "prepare", lambda self, device, error=error: broken(error))
        row = benchmark.measure(case, CPU, Roofline(1e12, 1e11, "made up"))
        assert row["status"] == "failed"
        assert "seconds" not in row
    assert row["reason"] == "OutOfResourcesError: shared memory"


def test_rows_of_a_measurement():
    (case,) = list(grid.cases("small", torch.bfloat16, ["linear"]))[:1]
    row = benchmark.measure(case, CPU, Roofline(1e12, 1e11, "made up"), budget_seconds=0.001)
    assert row["status"] == "ok"
    assert set(row["seconds"]) == {"tritontower", "torch linear", "torch product alone"}
    seconds = row["seconds"]["tritontower"]
    assert row["tflops"] == pytest.approx(2 * 70 * 48 * 80 / seconds / 1e12)
    assert row["share"] == pytest.approx(max(2 * 70 * 48 * 80 / 1e12, row["bytes"] / 1e11) / seconds)


def test_a_rival_that_cannot_is_left_out():
    (case,) = list(grid.cases("small", torch.bfloat16, ["gather"]))[:1]

    def cannot() -> torch.Tensor:
        raise NotImplementedError("not for this dtype")

    prepared = replace(case.prepare(CPU), rivals={"other": cannot})
    seconds, notes = benchmark.timings(prepared, CPU, budget_seconds=0.001)
    assert list(seconds) == ["tritontower"]
    assert notes == {"other": "NotImplementedError: not for this dtype"}


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989.4)]
)
def test_published_rooflines(name, tflops):
    assert published_roofline(name).flops == tflops * 1e12
    assert all(source for *_, source in PUBLISHED)


def test_a_device_that_nobody_has_heard_of():
    assert published_roofline("Some Other Chip") is None
