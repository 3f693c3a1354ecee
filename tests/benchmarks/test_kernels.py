"""Kernel benchmark: every case is right on every backend, and a wrong one is never timed."""

from dataclasses import replace

import pytest
import torch

from tritontower.benchmarks import cases as grid
from tritontower.benchmarks import kernels as benchmark
from tritontower.benchmarks.cases import Case, Prepared, check
from tritontower.benchmarks.measuring import Timing
from tritontower.benchmarks.roofline import PUBLISHED, Roofline, published_roofline
from tritontower.benchmarks.shapes import SIZES

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32]


def identity(case: Case) -> str:
    return f"{case.kernel}: {case.label}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", SIZES)
@pytest.mark.usefixtures("poisoned_empty")
def test_small_cases(device, kernel, dtype):
    """Kernel and reference, at sizes for the interpreter."""
    for case in grid.cases("small", dtype, [kernel]):
        outcome = check(case, case.prepare(device), device)
        assert outcome.passed, (identity(case), outcome)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(grid.cases("gpu")), ids=identity)
def test_production_cases(kernel_device, case):
    outcome = check(case, case.prepare(kernel_device), kernel_device)
    assert outcome.passed, outcome


@pytest.mark.parametrize("kernel", SIZES)
def test_check_detects_a_wrong_row(monkeypatch, kernel):
    """An error of half a percent in one row of seventy exceeds every limit."""
    (case, *_) = grid.cases("small", torch.float32, [kernel])
    prepared = case.prepare(CPU)

    def spoilt() -> torch.Tensor:
        result = prepared.result().clone()
        result[7 % len(result)] *= 1.005
        return result

    assert check(case, prepared, CPU).passed
    assert not check(case, replace(case.prepare(CPU), result=spoilt), CPU).passed


def test_wrong_or_failing_cases_are_not_timed(monkeypatch):
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


def test_measure_returns_times_and_rates():
    (case,) = list(grid.cases("small", torch.bfloat16, ["linear"]))[:1]
    row = benchmark.measure(case, CPU, Roofline(1e12, 1e11, "made up"), budget_seconds=0.001)
    assert row["status"] == "ok"
    assert set(row["seconds"]) == {"tritontower", "torch linear", "torch matmul only"}
    seconds = row["seconds"]["tritontower"]
    assert row["tflops"] == pytest.approx(2 * 70 * 48 * 80 / seconds / 1e12)
    assert benchmark.baseline_seconds(row) == {"torch linear": row["seconds"]["torch linear"]}
    # A CPU's caches exceed the rate of a copy, so no share is given.
    assert row["share"] is None
    assert "%" not in benchmark.table(document_of(row)).splitlines()[-1]


def document_of(*rows: dict) -> dict:
    roofline = {"flops": 1e12, "bytes": 1e11, "source": "made up"}
    return {"dtype": "bfloat16", "gpu": "made up", "roofline": roofline, "measured_roofline": roofline, "rows": rows}


def test_only_baselines_count_as_best_of_torch(monkeypatch):
    """Parts of the work and other orders of our kernels are timed, but are no baselines."""
    times = {"a": 3e-6, "half": 1e-6, "ours, apart": 2e-6}

    def time(call, **_):
        return Timing((times.get(call(), 4e-6),))

    monkeypatch.setattr(benchmark, "time_on_device", time)
    (case,) = list(grid.cases("small", torch.bfloat16, ["rope"]))[:1]
    named = {name: (lambda name=name: name) for name in times}
    prepared = replace(
        case.prepare(CPU),
        baselines={"a": named["a"]},
        others={"half": named["half"], "ours, apart": named["ours, apart"]},
    )
    monkeypatch.setattr(Case, "prepare", lambda *_: prepared)
    row = benchmark.measure(case, CPU, Roofline(1e12, 1e11, "made up"))
    assert set(row["seconds"]) == {"tritontower", *times}
    assert benchmark.baseline_seconds(row) == {"a": 3e-6}
    assert "0.75" in benchmark.table(document_of(row))


def test_candidates_share_one_clock(monkeypatch):
    asked: list[tuple[str, bool]] = []

    def time(call, *, graph, **_):
        name = call() or "ours"
        asked.append((name, graph))
        return Timing((1e-6,), "events" if name == "cannot be captured" or not graph else "graph")

    monkeypatch.setattr(benchmark, "time_on_device", time)
    (case,) = list(grid.cases("small", torch.bfloat16, ["gather"]))[:1]
    prepared = replace(case.prepare(CPU), call=lambda: None, baselines={"other": lambda: "cannot be captured"})
    timed, notes = benchmark.time_candidates(prepared, CPU)
    assert {timing.method for timing in timed.values()} == {"events"}
    assert asked == [("ours", True), ("cannot be captured", True), ("ours", False), ("cannot be captured", False)]
    assert not notes


def test_a_call_too_short_to_time_fails(monkeypatch):
    def time(*_, **__):
        raise RuntimeError("too short")

    monkeypatch.setattr(benchmark, "time_on_device", time)
    case = next(grid.cases("small", torch.bfloat16, ["gather"]))
    row = benchmark.measure(case, CPU, Roofline(1e12, 1e11, "made up"))
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: too short")


@pytest.mark.parametrize("kernel", ["qkv_projection", "rope", "linear", "norm"])
def test_baselines_compute_the_whole_result(kernel):
    """Baselines return the same values, up to the order of a head's columns."""
    for case in grid.cases("small", torch.float32, [kernel]):
        prepared = case.prepare(CPU)
        theirs = {name: call() for name, call in prepared.baselines.items()}
        prepared.call()
        ours = prepared.result().flatten(1).double().sort(1).values
        for name, result in theirs.items():
            values = result.reshape(len(ours), -1).double().sort(1).values
            assert torch.allclose(values, ours, atol=1e-3), (identity(case), name)


def test_an_unsupported_baseline_becomes_a_note():
    (case,) = list(grid.cases("small", torch.bfloat16, ["gather"]))[:1]

    def cannot() -> torch.Tensor:
        raise NotImplementedError("not for this dtype")

    prepared = replace(case.prepare(CPU), baselines={"other": cannot})
    seconds, notes = benchmark.time_candidates(prepared, CPU, budget_seconds=0.001)
    assert list(seconds) == ["tritontower"]
    assert notes == {"other": "NotImplementedError: not for this dtype"}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989.4), ("Some Chip", None)],
)
def test_published_rooflines(name, tflops):
    assert Roofline(1e12, 1e11, "made up").share(10**9, 10**8, 0.002) == pytest.approx(0.5)
    assert Roofline(1e12, 1e11, "made up").share(10**9, 10**7, 0.002) == pytest.approx(0.5)
    found = published_roofline(name)
    assert (found and found.flops) == (tflops and tflops * 1e12)
    assert all(source for *_, source in PUBLISHED)
