"""Commands over a small checkpoint: output, files, exit codes, and errors for bad input."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.towers.encoders import save_siglip
from support.towers.qwen import save_qwen3

from tritontower import VisionTower, cli
from tritontower.cli.parity import synthetic_images
from tritontower.embedding import load_embeddings
from tritontower.kernels.runtime import dispatch
from tritontower.parity import parity as parity_module


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for index, image in enumerate(synthetic_images()[:2]):
        paths.append(folder / f"{index}.png")
        image.save(paths[-1])
    return paths


def _run(*words: object) -> int:
    return cli.main([str(word) for word in words])


class TestInspect:
    def test_counts_match_encoding(self, qwen2_vl, images, capsys):
        assert _run("inspect", qwen2_vl, "--json", "--size", "350x120") == 0
        report = json.loads(capsys.readouterr().out)
        (embedding,) = VisionTower.from_pretrained(qwen2_vl, device="cpu").encode([images[1]])
        (image,) = report["images"]
        assert image["tokens"] == embedding.num_tokens
        assert image["grid"] == list(embedding.grid_thw[1:])
        assert report["dtype"] == "float32"
        assert report["config"]["depth"] == 3

    def test_needs_no_weights(self, qwen2_vl, tmp_path, capsys):
        for file in qwen2_vl.glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        assert _run("inspect", qwen2_vl, "--json") == 0
        expected = json.loads(capsys.readouterr().out)
        assert _run("inspect", tmp_path, "--json") == 0
        assert json.loads(capsys.readouterr().out) == expected
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert _run("inspect", tmp_path, "--json") == 0
        assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"

    @pytest.mark.parametrize(("backend", "said"), [("reference", True), ("interpreter", False)])
    def test_launches_of_a_cpu_graph_are_not_counted(self, qwen2_vl, backend, said, capsys):
        with dispatch.use(backend):
            assert _run("inspect", qwen2_vl, "--device", "cpu") == 0
        assert ("this is the graph for a CPU" in capsys.readouterr().out) == said

    def test_text_and_dot(self, qwen2_vl, tmp_path, capsys):
        assert _run("inspect", qwen2_vl, "--dot", tmp_path / "tower.dot", "--dtype", "bfloat16") == 0
        output = capsys.readouterr().out
        assert "1920 × 1080" in output
        assert "bfloat16" in output
        text = (tmp_path / "tower.dot").read_text(encoding="utf-8")
        assert 'label="blocks 0–2 × 3"' in text
        assert '"blocks.0.attention" -> ' in text


class TestEncode:
    def test_writes_the_towers_embeddings(self, qwen2_vl, images, tmp_path, capsys):
        output = tmp_path / "embeddings.safetensors"
        assert _run("encode", qwen2_vl, *images, "-o", output, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        expected = VisionTower.from_pretrained(qwen2_vl, device="cpu").encode(images)
        for index, (written, embedding) in enumerate(zip(load_embeddings(output), expected, strict=True)):
            assert torch.equal(written.embeddings, embedding.embeddings)
            assert (written.grid_thw, written.content_hash) == (embedding.grid_thw, embedding.content_hash)
            assert report["images"][index]["num_tokens"] == embedding.num_tokens
            assert report["images"][index]["content_hash"] == embedding.content_hash
            assert report["images"][index]["image"] == str(images[index])

    @pytest.mark.parametrize(
        ("save", "outputs"), [(partial(save_qwen3, "qwen3_vl"), "deepstack"), (save_siglip, "pooled")]
    )
    def test_writes_every_output(self, save, outputs, images, tmp_path):
        output = tmp_path / "embeddings.safetensors"
        folder = save(tmp_path / "model")
        assert _run("encode", folder, images[0], "-o", output) == 0
        (written,) = load_embeddings(output)
        (expected,) = VisionTower.from_pretrained(folder, device="cpu").encode(images[0])
        assert any(name.startswith(outputs) for name in written.tensors)
        assert written.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(written.tensors[name], rows) for name, rows in expected.tensors.items())

    def test_pixel_limits(self, qwen2_vl, images, tmp_path, capsys):
        assert _run("encode", qwen2_vl, images[0], "-o", tmp_path / "e", "--json", "--max-pixels", 112 * 112) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert image["processed_size"] == [112, 112]


class TestParity:
    def test_passes(self, qwen2_vl, capsys):
        assert _run("parity", qwen2_vl, "--per-node", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["passed"]
        assert 0 < report["error"] <= report["limit"] == 1e-5
        assert report["nodes"][-1]["value"] == "embeddings"

    def test_a_difference_is_exit_code_1(self, qwen2_vl, images, monkeypatch, capsys):
        monkeypatch.setattr(parity_module, "FLOAT32_TOLERANCE", 1e-12)
        assert _run("parity", qwen2_vl, images[0]) == 1
        assert "FAIL" in capsys.readouterr().out


class TestDemo:
    @pytest.mark.parametrize(("parity", "compared"), [("smallest", "1.png"), ("all", "0.png, 1.png"), ("none", None)])
    def test_encodes_compares_and_draws(self, parity, compared, qwen2_vl, images, tmp_path, capsys):
        assert _run("demo", *images, "--model", qwen2_vl, "--output", tmp_path / "out", "--parity", parity) == 0
        output = capsys.readouterr().out
        assert "0.png" in output
        assert "bit for bit equal to each image alone" in output
        assert ("\npass:" in output) == (compared is not None)
        assert compared is None or f"(compared: {compared})" in output
        with Image.open(tmp_path / "out" / "features.png") as drawing:
            assert drawing.height > drawing.width / 3

    def test_a_difference_is_exit_code_1(self, qwen2_vl, images, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(parity_module, "FLOAT32_TOLERANCE", 1e-12)
        assert _run("demo", images[0], "--model", qwen2_vl, "--output", tmp_path) == 1
        assert "FAIL" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["encode", "https://example.org/model", "{image}"], "model must be a local folder"),
            (["encode", "{folder}/absent", "{image}"], "model must be a local folder"),
            (["encode", "{model}", "https://example.org/a.png"], "got the URL"),
            (["encode", "{model}", "{folder}/absent.png"], "got no file"),
            (["encode", "{model}", "{folder}/corrupt.png"], "corrupt.png"),
            (["encode", "{model}", "{folder}/notes.txt"], "not an image"),
            (["encode", "{model}", "{image}", "--device", "gpu"], "got 'gpu'"),
            (["inspect", "{folder}"], "config.json"),
            (["inspect", "{folder}/text-only"], "vision"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, arguments, message, qwen2_vl, images, tmp_path, capsys):
        (tmp_path / "corrupt.png").write_bytes(images[0].read_bytes()[:200])
        (tmp_path / "notes.txt").write_text("no image")
        (tmp_path / "text-only").mkdir()
        (tmp_path / "text-only" / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 8}')
        words = [word.format(model=qwen2_vl, folder=tmp_path, image=images[0]) for word in arguments]
        if words[0] == "encode":
            words += ["-o", str(tmp_path / "out.safetensors")]
        assert cli.main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("tritontower: error: ")
        assert message in captured.err
        assert not (tmp_path / "out.safetensors").exists()

    def test_unwritable_output_is_refused(self, qwen2_vl, images, capsys):
        assert _run("encode", qwen2_vl, images[0], "-o", "/proc/embeddings") == 2
        assert "/proc/embeddings cannot be written" in capsys.readouterr().err

    def test_an_interrupted_write_keeps_the_old_file(self, qwen2_vl, images, tmp_path, monkeypatch, capsys):
        output = tmp_path / "out.safetensors"
        output.write_bytes(b"before")

        def interrupted(_tensors, path, **_):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr("safetensors.torch.save_file", interrupted)
        assert _run("encode", qwen2_vl, images[0], "-o", output) == 130
        assert [path.name for path in tmp_path.iterdir()] == [output.name]
        assert output.read_bytes() == b"before"

    def test_a_pipe_is_no_output(self, qwen2_vl, images, tmp_path, capsys):
        os.mkfifo(tmp_path / "pipe")
        assert _run("encode", qwen2_vl, images[0], "-o", tmp_path / "pipe") == 2
        assert "not an ordinary file" in capsys.readouterr().err
        assert (tmp_path / "pipe").is_fifo()

    def test_non_finite_distances_are_null_in_json(self, qwen2_vl, images, monkeypatch, capsys):
        monkeypatch.setattr(parity_module, "relative_error", lambda *_: float("nan"))
        assert _run("parity", qwen2_vl, images[0], "--json") == 1
        report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert report["error"] is None
        assert not report["passed"]
