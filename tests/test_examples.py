"""Every example runs on a small random checkpoint and prints correct results."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image
from safetensors.torch import load
from support.checkpoints import noise
from support.vlms import save_wide

from tritontower import VisionTower
from tritontower.embedding import load_embeddings
from tritontower.integrations.transformers import load_vlm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} this{% endif %}"
)
# Large weights make varied answers.
TEXT = {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide("qwen2_5_vl", tmp_path_factory.mktemp("examples") / "qwen2_5_vl", CHAT_TEMPLATE, **TEXT)[0]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide("llava", tmp_path_factory.mktemp("examples") / "llava", **TEXT)[0]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "image0.png", tmp_path / "image1.png"]
    for path, size in zip(paths, [(90, 60), (56, 112)], strict=True):
        Image.fromarray(noise(*size)).save(path)
    return paths


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as a script and returns what it prints."""

    def run_example(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_examples_are_short_tested_and_listed() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    tests = Path(__file__).read_text(encoding="utf-8")
    page = (EXAMPLES.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    assert len(files) == 6
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) < 60, file.name
        assert f'"{file.name}"' in tests
        assert f"`examples/{file.name}`" in page


def test_minimal_encode(run: Run, qwen: Path, images: list[Path], tmp_path: Path) -> None:
    output = run("minimal_encode.py", *images, "--model", qwen, "--output", tmp_path / "rows.safetensors")
    expected = VisionTower.from_pretrained(qwen).encode(images)
    for path, embedding in zip(images, expected, strict=True):
        assert re.search(rf"{path.name}: .* {embedding.num_tokens} tokens", output)
    for found, embedding in zip(load_embeddings(tmp_path / "rows.safetensors"), expected, strict=True):
        assert torch.equal(found.embeddings, embedding.embeddings)


@pytest.mark.parametrize("chunk", [5, 256])
def test_engine_loop(run: Run, images: list[Path], qwen: Path, chunk: int) -> None:
    output = run("engine_loop.py", images[0], "what is", "--model", qwen, "--chunk", chunk)
    model, processor = load_vlm(qwen)
    text = "user <|vision_start|><|image_pad|><|vision_end|>what is this"
    inputs = processor(text=text, images=[Image.open(images[0])], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(answer, skip_special_tokens=True)
    assert len(set(expected.split())) > 2
    assert output.strip() == expected


def test_swap_into_transformers(run: Run, llava: Path, images: list[Path]) -> None:
    output = run("swap_into_transformers.py", images[0], "what is <image> this", "--model", llava, "--tokens", 8)
    swapped, own = re.findall(r"^with(?:out it| the tower): +(.*)$", output, re.MULTILINE)
    assert swapped == own
    assert len(set(own.split())) > 2
    assert float(re.findall(r"([\d.]+) MiB of vision weights shared", output)[0]) > 0


def test_four_bit_vlm(run: Run, qwen: Path, images: list[Path]) -> None:
    pytest.importorskip("bitsandbytes")
    output = run("four_bit_vlm.py", images[0], "what is", "--model", qwen, "--tokens", 8)
    first, answer = output.strip().splitlines()
    # Four linears of attention and three of the MLP, in two layers.
    assert first == "14 linears of the language model in 4 bits, the tower in torch.float32"
    assert answer.split()


def test_export_for_vllm(
    run: Run, qwen: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = tmp_path / "embeddings.safetensors"
    first = run("export_for_vllm.py", "encode", *images, "--model", qwen, "--file", file)
    tokens = sum(embedding.num_tokens for embedding in load_embeddings(file))
    assert first.startswith(f"2 embeddings, {tokens} tokens")
    second = run("export_for_vllm.py", "ask", "what is <|image_pad|>", "--model", qwen, "--file", file)
    assert second.splitlines() == [
        f"image_embeds: [{tokens}, 64] torch.float32",
        "image_grid_thw: [2, 3] torch.int64",
    ]


def test_serve_threads(qwen: Path, images: list[Path]) -> None:
    command = [sys.executable, EXAMPLES / "serve_threads.py", "--model", qwen, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()

        def post(body: bytes) -> Any:
            with urlopen(Request(address, data=body, method="POST"), timeout=60) as response:
                return load(response.read())["embeddings"]

        expected = [embedding.embeddings for embedding in VisionTower.from_pretrained(qwen).encode(images)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(post, [path.read_bytes() for path in images] * 8))
        for index, rows in enumerate(found):
            assert torch.equal(rows, expected[index % 2])
        with pytest.raises(HTTPError) as refused:
            post(b"no image")
        assert refused.value.code == 400
        assert b"image 0" in refused.value.read()
    finally:
        process.terminate()
        process.wait(timeout=30)
