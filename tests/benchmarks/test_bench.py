"""`tritontower bench` on small towers: what it measures, saves, prints and refuses."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.towers.qwen import save_qwen2_vl

from tritontower import VisionTower, cli
from tritontower.benchmarks import (
    documents,
    images,
    matmul_only,
    measuring,
    peers,
    plots,
    preprocessing,
    subprocesses,
    towers,
)
from tritontower.benchmarks.launches import launch_rows
from tritontower.benchmarks.measuring import Timing, interleaved, portable_command, provenance, time_on_device
from tritontower.benchmarks.towers import CheckedReference, fastest_baseline, node_seconds, split_table
from tritontower.engine.launch_count import count_launches
from tritontower.errors import UsageError
from tritontower.graph.builder import build
from tritontower.graph.cost import estimate_cost, estimate_total_cost
from tritontower.graph.memory_plan import SMALL_WORKSPACE_BYTES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower(qwen2_vl) -> VisionTower:
    return VisionTower.from_pretrained(qwen2_vl, device="cpu")


@pytest.fixture
def no_compiler(monkeypatch):
    def cannot(reference, inputs):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setitem(towers._BUILD_BASELINE, "compile", cannot)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command without the interpreter; returns exit code, stdout and stderr."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def command(*words: object) -> tuple[int, str, str]:
        code = cli.main(["bench", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


class TestMeasuring:
    def test_candidates_take_turns_after_an_uncounted_round(self):
        calls: list[str] = []
        candidates = {name: (lambda name=name: calls.append(name)) for name in "ab"}
        times = interleaved(candidates, repeats=2, device=CPU)
        assert "".join(calls) == "ababab"
        assert [len(timing.seconds) for timing in times.values()] == [2, 2]

    def test_timing(self):
        timing = Timing((4.0, 1.0, 2.0, 3.0, 10.0))
        assert (timing.best, timing.median) == (1.0, 3.0)
        assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)
        assert Timing((1.0,)).spread == 0.0

    def test_a_cpu_is_timed_by_wall_clock_with_evicted_caches(self, monkeypatch):
        order: list[str] = []
        monkeypatch.setattr(measuring, "_evict_from_cpu", lambda: order.append("evict"))
        timing = time_on_device(lambda: order.append("call"), device=CPU, budget_seconds=0.0, least=2)
        assert (timing.method, len(timing.seconds)) == ("clock", 2)
        assert order == ["call", "evict", "call", "evict", "call"]
        assert len(time_on_device(lambda: None, device=CPU, budget_seconds=60.0, most=6).seconds) == 6

    def test_a_negative_difference_counts_but_not_a_negative_median(self, monkeypatch):
        """A GPU whose captured graphs take these times."""
        times: dict[str, Iterator[float]] = {}
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(measuring, "_cache_bytes", lambda _: 64)
        monkeypatch.setattr(measuring, "_between_events", lambda name: next(times[name]))
        monkeypatch.setattr(torch, "empty", lambda *_, **__: None)

        def measure(*busy: float) -> Timing:
            names = iter(("busy", "idle"))
            monkeypatch.setattr(measuring, "_captured", lambda _: SimpleNamespace(replay=next(names)))
            times.update(busy=iter(busy), idle=iter((10e-5, 11e-5, 10e-5)))
            return time_on_device(lambda: None, device=torch.device("cuda"), least=3, most=3)

        timing = measure(11e-5, 10e-5, 12e-5)
        assert timing.seconds == pytest.approx((1e-6, -1e-6, 2e-6))
        assert (timing.method, timing.median) == ("graph", pytest.approx(1e-6))
        with pytest.raises(RuntimeError, match=r"got a median of -1.00 µs over 3 differences"):
            measure(9e-5, 10e-5, 12e-5)

    def test_provenance_names_versions_and_machine(self):
        found = provenance(CPU)
        assert found["torch"] == torch.__version__
        assert found["command"].startswith("python ")
        assert {"date", "commit", "triton", "transformers", "cpu", "threads", "capability"} <= found.keys()
        json.dumps(found)

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["/usr/bin/python3.12", "-m", "bench.campaign", "--cpu"], "python -m bench.campaign --cpu"),
            (["python", "/here/bench/report.py"], "python bench/report.py"),
            (["python", "/usr/local/bin/tritontower", "bench", "../model"], "python tritontower bench ../model"),
            (["python", "x.py", "--output=/elsewhere/found here"], "python x.py '--output=found here'"),
        ],
    )
    def test_portable_command_drops_local_paths(self, words, expected):
        assert portable_command(words, Path("/here")) == expected

    @pytest.mark.gpu
    def test_graph_and_events_agree_on_a_gpu(self):
        device = torch.device("cuda")
        left = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(left)

        by_graph, by_events = (
            time_on_device(lambda: torch.mm(left, left, out=out), device=device, graph=graph) for graph in (True, False)
        )
        assert (by_graph.method, by_events.method) == ("graph", "events")
        assert 0 < by_graph.median < 2 * by_events.median
        assert provenance(device)["gpu"]

    @pytest.mark.gpu
    def test_a_synchronizing_call_is_timed_by_events(self):
        rows = torch.ones(10, device="cuda")
        assert time_on_device(lambda: rows.sum().item(), device=rows.device, budget_seconds=0.01).method == "events"


class TestBenchmarks:
    def test_all_candidates_agree_and_have_times(self, tower):
        reference = CheckedReference(tower, tower.dtype)
        row = towers.compare_times(
            tower, reference, images.square_batch(tower, 64), repeats=2, baselines=["sdpa", "eager"], family="x"
        )
        assert row["status"] == "ok"
        assert set(row["seconds"]) == {"tritontower", "transformers sdpa", "transformers eager", "matmul only"}
        assert {len(seconds) for seconds in row["seconds"].values()} == {2}
        assert 0 < max(row["distances"].values()) < 1e-5
        assert reference.model.config._attn_implementation == "sdpa"
        medians = documents.median_seconds(row)
        fastest = min(medians["transformers sdpa"], medians["transformers eager"])
        assert row["ratio"] == pytest.approx(fastest / medians["tritontower"])
        assert (row["patches"], row["tokens"]) == (64, 16)
        assert row["checked"]
        assert 0 < row["accuracy"]["embeddings"]["error"] < row["accuracy"]["embeddings"]["limit"] == 1e-5

    @pytest.mark.usefixtures("no_compiler")
    def test_a_failing_baseline_becomes_a_note(self, tower):
        reference = CheckedReference(tower, tower.dtype)
        row = towers.compare_times(tower, reference, images.square_batch(tower, 16), repeats=1, baselines=["compile"])
        assert row["notes"] == {"transformers sdpa, torch.compile": "RuntimeError: no compiler here"}
        assert list(row["seconds"]) == ["tritontower", "matmul only"]
        assert row["ratio"] is None
        assert not row["checked"]
        assert row["accuracy"]["embeddings"]["error"] < 1e-5
        document = {"dtype": "float32", "gpu": "made up", "rows": [{**row, "family": "F", "batch": "P"}]}
        assert "unchecked" in towers.table(document)

    @pytest.mark.usefixtures("no_compiler")
    @pytest.mark.parametrize("baselines", [["sdpa"], ["compile"]])
    def test_16_bit_results_are_compared_with_fp32(self, qwen2_vl, monkeypatch, baselines):
        """Off by 4 %: less than the distance of two correct towers, more than transformers' own error."""
        monkeypatch.setattr(towers, "interleaved", lambda *_, **__: pytest.fail("was timed"))
        tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", dtype="bfloat16")
        forward, run = tower.forward, tower.run
        monkeypatch.setattr(tower, "forward", lambda batch: forward(batch) * 1.04)
        monkeypatch.setattr(tower, "run", lambda batch: {name: rows * 1.04 for name, rows in run(batch).items()})
        row = towers.compare_times(
            tower, CheckedReference(tower, tower.dtype), images.square_batch(tower, 16), baselines=baselines
        )
        assert row["status"] == "failed"
        assert "too far from transformers in fp32 on an image of 224 × 224: embeddings by" in row["reason"]
        found = row["accuracy"]["embeddings"]
        assert found["error"] > found["limit"] > 0

    def test_a_correct_tower_in_16_bits_passes(self, qwen2_vl):
        tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", dtype="bfloat16")
        reference = CheckedReference(tower, tower.dtype)
        row = towers.compare_times(tower, reference, images.square_batch(tower, 16), repeats=1)
        assert (row["status"], row["checked"]) == ("ok", True)
        assert row["accuracy"]["embeddings"]["limit"] == 1.1 * reference.accuracy["embeddings"].reference_error

    def test_without_a_reference_a_time_is_unchecked(self, tower, monkeypatch):
        def too_large(*_, **__):
            raise torch.OutOfMemoryError("out of memory")

        row = towers.compare_times(tower, None, images.square_batch(tower, 16), repeats=1)
        assert (row["status"], row["checked"]) == ("ok", False)
        assert "accuracy" not in row
        reference = CheckedReference(tower, tower.dtype)
        monkeypatch.setattr(CheckedReference, "accuracy", property(too_large))
        row = towers.compare_times(tower, reference, images.square_batch(tower, 16), repeats=1)
        assert row["status"] == "ok"
        assert row["notes"] == {"transformers in fp32": "OutOfMemoryError: out of memory"}

    def test_matmul_only_covers_all_matmuls(self, tower, monkeypatch):
        """Their FLOPs are those of the graph without attention."""
        made: list[int] = []

        def count(x: torch.Tensor, weight: torch.Tensor, bias: None) -> None:
            made.append(2 * x.shape[0] * weight.shape[0] * x.shape[1])

        monkeypatch.setattr(matmul_only, "matmul", count)
        monkeypatch.setattr(matmul_only, "prepack", lambda weight: weight)
        workload = images.square_batch(tower, 64).workload
        matmul_only.matmul_only(tower.graph, workload, device=CPU, dtype=torch.float32)()
        attention = [node for node in tower.graph.nodes if node.kind == "attention"]
        by_attention = sum(estimate_cost(tower.graph, node, workload, 4).flops for node in attention)
        assert len(attention) == tower.config.depth
        assert sum(made) == estimate_total_cost(tower.graph, workload, 4).flops - by_attention

    def test_square_batch_repeats_fixed_sizes(self):
        with images.family_checkpoint("CLIP", depth=1) as folder:
            clip = VisionTower.from_pretrained(folder, device="cpu", dtype="float32", delay_load=True)
            batch = images.square_batch(clip, 3 * clip.config.num_patches)
        assert len(batch) == 3

    def test_an_impossible_patch_count_is_refused(self, tower, monkeypatch):
        def refuses(*_, **__):
            raise ValueError("no such grid")

        monkeypatch.setattr(images.PackedBatch, "pack", refuses)
        with pytest.raises(UsageError, match=r"got 64 \(no such grid\); name image sizes"):
            images.square_batch(tower, 64)

    def test_truncated_depth_drops_deepstack_levels(self):
        config = {"vision_config": {"depth": 27, "deepstack_visual_indexes": [8, 16, 24]}, "model_type": "x"}
        assert images.truncate_depth(config, 10)["vision_config"] == {"depth": 10, "deepstack_visual_indexes": [8]}
        assert images.truncate_depth(config, 0) == config

    def test_preprocessing_is_compared_with_transformers(self, tower):
        row = preprocessing.compare_preprocessing(tower, "two", [(56, 84), (100, 60)], repeats=1)
        assert row["status"] == "ok"
        assert {"tritontower", "transformers"} <= row["seconds"].keys()
        assert row["distance"] <= row["limit"]

    def test_different_pixels_are_not_timed(self, tower, monkeypatch):
        monkeypatch.setattr(preprocessing, "LIMIT", -1.0)
        monkeypatch.setattr(preprocessing, "interleaved", lambda *_, **__: pytest.fail("was timed"))
        row = preprocessing.compare_preprocessing(tower, "one", [(56, 56)])
        assert row["status"] == "failed"

    def test_rows_are_the_counts_of_the_graphs(self, tower):
        (row,) = launch_rows(tower, [("64 patches", lambda tower: images.square_batch(tower, 64))], "x")
        plain = count_launches(build(tower.config), images.square_batch(tower, 64).workload, device="sm_90")
        assert row["plain_forward"] == plain.total.total
        assert row["architectures"]["sm_90"]["block"] < row["plain_block"]
        assert row["architectures"]["sm_90"]["forward"] < row["plain_forward"]

    def test_memory_and_loading_run_in_fresh_processes(self, tmp_path):
        folder = str(save_qwen2_vl(tmp_path / "model", depth=2, hidden_size=96, mlp_ratio=4))
        options = {"folder": folder, "dtype": "float32", "device": "cpu"}
        memory = subprocesses.measure_apart("memory", **options, patches=64)
        assert memory["patches"] == 64
        assert memory["growth_bytes"] > memory["weights_bytes"] > 0
        assert 0 < memory["plan_bytes"] <= memory["planned_bytes"]
        assert memory["allocated_bytes"] <= memory["planned_bytes"]
        assert memory["allocated_bytes"] == pytest.approx(memory["planned_bytes"] - SMALL_WORKSPACE_BYTES, rel=0.1)
        load = subprocesses.measure_apart("load", **options, by="transformers", cold=True)
        assert load["kind"] == "Reference"
        assert load["seconds"] > 0
        assert load["files_bytes"] > load["weights_bytes"] > 0
        load = subprocesses.load(folder, "float32", "cpu", by="tritontower", cold=False)
        assert load["kind"] == "VisionTower"
        assert 0 < load["read_bytes"] <= load["files_bytes"]

    def test_a_failing_subprocess_reports_its_error(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"CheckpointNotFoundError|ConfigError|no config"):
            subprocesses.measure_apart("memory", folder=str(tmp_path), dtype="float32", device="cpu", patches=64)


class TestDocuments:
    def test_files_are_written_completely_or_not_at_all(self, tmp_path):
        path = tmp_path / "new" / "report.json"
        documents.replace_file(path, "whole")
        with pytest.raises(UnicodeEncodeError):
            documents.replace_file(path, "half\ud800")
        assert path.read_text() == "whole"
        assert os.listdir(path.parent) == ["report.json"]

    @pytest.mark.parametrize(
        ("machine", "words", "slug"),
        [
            ({"cpu": "AMD EPYC (x)", "threads": 1}, "1 thread of AMD EPYC (x)", "cpu-amd-epyc-x-1-threads"),
            ({"cpu": "AMD EPYC (x)", "threads": 2}, "2 threads of AMD EPYC (x)", "cpu-amd-epyc-x-2-threads"),
            ({"gpu": "NVIDIA H200", "cpu": "Some CPU"}, "NVIDIA H200", "nvidia-h200"),
        ],
    )
    def test_machines_in_words(self, machine, words, slug):
        assert documents.describe_machine(machine) == words
        assert documents.machine_slug(machine) == slug

    def test_errors_are_described_in_one_line(self):
        assert documents.describe_error(ValueError("a\n  b")) == "ValueError: a b"
        assert len(documents.describe_error(ValueError("a" * 999), 100)) == 100


DOCUMENT = {
    "bench": "towers",
    "dtype": "bfloat16",
    "gpu": "made up",
    "rows": [
        {
            "status": "ok",
            "family": "F",
            "images": count,
            "patches": 1024,
            "seconds": {"transformers sdpa": [0.2], "tritontower": [0.1, 0.3, 0.2]},
        }
        for count in (1, 6)
    ]
    + [{"status": "failed", "family": "G"}],
}


class TestPlots:
    def test_groups_and_candidates(self):
        assert plots.group_times(DOCUMENT) == [
            ("F: 1,024 patches", {"transformers sdpa": 200.0, "tritontower": 200.0}),
            ("F: 6 images, 1,024 patches", {"transformers sdpa": 200.0, "tritontower": 200.0}),
        ]
        names = ("transformers sdpa", "matmul only", "tritontower eager", "tritontower")
        assert towers.order_candidates(names) == [*names[3:1:-1], names[0], names[1]]

    def test_without_matplotlib_the_message_says_so(self, monkeypatch, tmp_path):
        for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UsageError, match="plots need matplotlib"):
            plots.plot(DOCUMENT, tmp_path / "plot.png")
        with pytest.raises(UsageError, match="got 'towers' without any"):
            plots.plot({**DOCUMENT, "rows": []}, tmp_path / "plot.png")

    def test_an_image_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is optional, and not installed here")
        plots.plot(DOCUMENT, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class FakeOpenVINO:
    """Runs the model by torch, as OpenVINO would run the compiled one."""

    def __init__(self) -> None:
        self.Core, self.options = lambda: self, {}

    def convert_model(self, model, example_input=None):
        return model if example_input else model.module()

    def compile_model(self, model, device, options):
        self.options = options
        request = SimpleNamespace(infer=lambda arrays: [model(*map(torch.from_numpy, arrays)).detach().numpy()])
        return SimpleNamespace(create_infer_request=lambda: request)


class TestPeers:
    def test_openvino_runs_the_model_of_transformers(self, monkeypatch, tower):
        openvino = FakeOpenVINO()
        monkeypatch.setitem(sys.modules, "openvino", openvino)
        row = self.compare(tower, "openvino")
        assert row["status"] == "ok", row
        assert row["distances"]["OpenVINO"] <= 1e-5
        assert openvino.options["INFERENCE_PRECISION_HINT"] == "f32"

    def test_zentorch_is_a_backend_of_torch_compile(self, monkeypatch, tower):
        monkeypatch.setitem(sys.modules, "zentorch", SimpleNamespace())
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(options) or module)
        row = self.compare(tower, "zentorch")
        assert row["distances"]["torch.compile, zentorch"] <= 1e-5
        assert row["ratio"] == fastest_baseline(row)[1] > 0
        assert compiled == [{"backend": "zentorch", "dynamic": False}]

    def test_onnxruntime_takes_fp32_only(self, monkeypatch, tower):
        monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
        with pytest.raises(UsageError, match="set --dtype float32"):
            peers.onnxruntime(SimpleNamespace(dtype=torch.bfloat16), images.square_batch(tower, 16))

    @pytest.mark.parametrize("name", towers.PEERS)
    def test_a_missing_package_is_named(self, monkeypatch, run, name):
        monkeypatch.setattr(peers, "find_spec", lambda package: None)
        code, _, error = run("towers", "--family", "CLIP", "--against", f"sdpa,{name}")
        assert code != 0
        assert f"against {name} needs the package {name}; run pip install {name}" in error

    def compare(self, tower, name):
        reference = CheckedReference(tower, tower.dtype)
        return towers.compare_times(tower, reference, images.square_batch(tower, 16), repeats=1, baselines=[name])


class TestSplit:
    def test_every_node_kind_is_timed_once(self, tower):
        seconds = node_seconds(tower, images.square_batch(tower, 16), repeats=1)
        assert set(seconds) == {node.kind for node in tower.graph.nodes}
        assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
        assert min(seconds.values()) > 0

    def test_table_has_a_dash_for_missing_kinds(self):
        table = split_table({"first": {"linear": 0.002, "rope": 0.001}, "second": {"linear": 0.0005}})
        first, second = (line.split() for line in table.splitlines() if line.startswith(("first", "second")))
        assert first == ["first", "2.0", "1.0", "3.0"]
        assert second == ["second", "0.5", "–", "0.5"]


class TestCommand:
    def test_towers(self, run, qwen2_vl, tmp_path):
        output = tmp_path / "report.json"
        words = ("--split", "--patches", "16,64", "--size", "84x56", "--repeats", 1, "--json")
        code, printed, table = run("towers", qwen2_vl, *words, "--output", output)
        assert code == 0
        report = json.loads(printed.splitlines()[-1])
        assert report == json.loads(output.read_text())
        assert [row["batch"] for row in report["rows"]] == ["16 patches", "64 patches", "84 × 56"]
        assert report["dtype"] == "float32"
        assert "ratio: fastest baseline ÷ tritontower" in table
        assert "Milliseconds by node kind" in table

    def test_preprocessing_of_several_families(self, run):
        words = ("--family", "CLIP", "--family", "Qwen2-VL", "--size", "56x56", "--repeats", 1, "--json")
        code, printed, _ = run("preprocessing", *words)
        assert code == 0
        assert [row["label"] for row in json.loads(printed)["rows"]] == ["CLIP: 56 × 56", "Qwen2-VL: 56 × 56"]

    def test_a_disagreement_is_not_timed_and_exit_code_1(self, run, qwen2_vl, monkeypatch):
        monkeypatch.setattr(towers, "interleaved", lambda *_, **__: pytest.fail("was timed"))
        monkeypatch.setattr(towers, "AGREEMENT", {"float32": 1e-12})
        code, printed, _ = run("towers", qwen2_vl, "--patches", 16, "--split")
        assert code == 1
        assert "the embeddings differ: transformers sdpa by" in printed

    def test_kernels(self, run, monkeypatch):
        code, printed, _ = run("kernels", "--kernel", "rope", "--dtype", "float32", "--against", "none")
        assert code == 0
        assert "% of roofline" in printed
        assert printed.count("\nrope ") == 2

    @pytest.mark.parametrize("kind", [("launches",), ("preprocessing", "--size", "56x56", "--repeats", 1)])
    def test_no_weights_are_made_or_read(self, run, monkeypatch, tmp_path, kind):

        monkeypatch.setenv("TRITONTOWER_CACHE", str(tmp_path))
        monkeypatch.setattr(
            "tritontower.engine.weight_loader.read_weights", lambda *_, **__: pytest.fail("weights were read")
        )
        code, printed, _ = run(*kind)
        assert code == 0
        assert "448" in printed or "56 × 56" in printed
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("kind", [("launches",), ("preprocessing", "--size", "56x56", "--repeats", 1)])
    def test_only_the_configuration_is_fetched_from_a_hub(self, run, qwen2_vl, monkeypatch, kind):
        asked: list[tuple[str, str | None]] = []

        def locate(name, *, revision=None, **_):
            asked.append((name, revision))
            return qwen2_vl

        monkeypatch.setattr("tritontower.checkpoint.hub.locate", locate)
        monkeypatch.setattr(VisionTower, "load", lambda *_, **__: pytest.fail("weights were loaded"))
        code, _, _ = run(kind[0], "some/tower", *kind[1:], "--revision", "v2")
        assert code == 0
        assert asked == [("some/tower", "v2")]

    def test_only_launches_run_under_the_interpreter_variable(self, run, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        code, printed, _ = run("launches", "--family", "Qwen2-VL", "--family", "CLIP", "--json")
        assert code == 0
        assert [row["blocks"] for row in json.loads(printed)["rows"]] == [32, 24]
        code, _, error = run("kernels")
        assert code == 2
        assert "the interpreter's times mean nothing" in error

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("towers", "some/model", "--family", "CLIP"), "MODEL and --family name different towers"),
            (("launches", "--family", "Qwen9"), "family must be one of CLIP"),
            (("kernels", "--kernel", "attenshun"), "--kernel must be one of attention"),
            (("kernels", "some/model"), "MODEL has no effect on kernels; it goes with towers, preprocessing, loading"),
            (("kernels", "--against", "bogus"), "--against of `bench kernels` must be none, got bogus"),
            (("loading", "--against", "sdpa,none"), "--against of `bench loading` must be none, got sdpa,none"),
            (
                ("memory", "--against", "bogus"),
                "--against has no effect on memory; it goes with kernels, towers, loading",
            ),
            (("launches", "--split"), "--split has no effect on launches; it goes with towers"),
            (("towers", "--kernel", "linear"), "--kernel has no effect on towers"),
            (("towers", "--revision", "main"), "--revision needs a hub id"),
            (("towers", "--family", "CLIP", "--patches", "100000000"), "must be at most 1048576 patches"),
            (("towers", "--batch", "huge"), "--batch must be one of 448"),
            (("towers", "--depth", "3"), "--depth needs --family"),
            (("towers", "--family", "CLIP", "--depth", "-3"), "must be a positive whole number, got '-3'"),
            (("towers", "--plot", "towers.svg"), "must end in .png"),
            (
                ("towers", "--against", "jax"),
                "against must be among sdpa, eager, compile, openvino, zentorch, onnxruntime, got jax",
            ),
            (("preprocessing", "--patches", "64"), "--patches has no effect on preprocessing"),
            (("loading", "--family", "all"), "--family of `bench loading` must be one title"),
            (("everything",), "invalid choice: 'everything'"),
        ],
    )
    def test_bad_options_are_one_line_and_exit_code_2(self, run, words, message):
        code, _, error = run(*words)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
