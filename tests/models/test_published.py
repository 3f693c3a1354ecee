"""Towers of published size: ``tritontower inspect`` without weights agrees with ``tests/support/published.py``."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.published import PUBLISHED, PublishedTower

from tritontower import cli
from tritontower.models.common.family import write_config

each_tower = pytest.mark.parametrize("tower", PUBLISHED, ids=lambda tower: tower.name)
EACH_IMAGE = [(tower, image) for tower in PUBLISHED for image in tower.images]
each_image = pytest.mark.parametrize(
    ("tower", "image"), EACH_IMAGE, ids=[f"{tower.name}-{image.side}" for tower, image in EACH_IMAGE]
)


@pytest.fixture
def inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on a folder with the configuration and the processor file only."""

    def run(tower: PublishedTower, side: int = 448) -> dict[str, Any]:
        folder = write_config(tmp_path / tower.name, tower.summary, tower.config)
        assert cli.main(["inspect", str(folder), "--json", "--size", f"{side}x{side}"]) == 0
        assert not list(folder.glob("*.safetensors"))
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    return run


def list_nodes(report: dict[str, Any], *, projector: bool) -> list[dict[str, Any]]:
    return [node for node in report["graph"]["nodes"] if node["name"].startswith("projector") == projector]


def round_as(text: str, millions: float) -> str:
    """Formats ``millions`` with as many decimals as ``text`` has."""
    return f"{millions:.{len(text.partition('.')[2])}f}"


@each_tower
def test_parameters_match_the_published_numbers(tower: PublishedTower, inspect: Any) -> None:
    report = inspect(tower)
    graph, depth = report["graph"], report["config"]["depth"]
    blocks = {node["block"] for node in graph["nodes"]} - {None}
    # A block after the last needed one is published, but not part of the graph.
    unbuilt = depth - len(blocks)
    published = graph["parameters"] + unbuilt * sum(n["parameters"] for n in graph["nodes"] if n["block"] == 0)
    projector = sum(node["parameters"] for node in list_nodes(report, projector=True))
    assert unbuilt == (1 if report["config"]["family"] == "llava" and report["config"]["class_token"] else 0)
    if not tower.projector_millions:
        assert round_as(tower.tower_millions, published / 1e6) == tower.tower_millions
        return
    assert round_as(tower.projector_millions, projector / 1e6) == tower.projector_millions
    assert round_as(tower.tower_millions, (published - projector) / 1e6) == tower.tower_millions


@each_image
def test_patches_and_tokens_match_the_published_numbers(tower: PublishedTower, image: Any, inspect: Any) -> None:
    report = inspect(tower, image.side)
    workload = report["graph"]["workload"]
    class_rows = image.tiles if report["config"]["class_token"] else 0
    assert (workload["patches"] - class_rows, workload["tiles"]) == (image.patches, image.tiles)
    assert workload["tokens"] == report["images"][0]["tokens"] == image.tokens


@each_image
def test_flops_match_the_published_numbers(tower: PublishedTower, image: Any, inspect: Any) -> None:
    """Within 1 %: rounding of the published numbers, and the second frame of a still image, which is folded (−0.1 %)."""
    report = inspect(tower, image.side)
    flops = report["graph"]["flops"]
    assert flops == report["images"][0]["flops"]
    if image.tiles > 1:
        flops = sum(node["flops"] for node in list_nodes(report, projector=False)) / image.tiles
    assert flops / 1e12 == pytest.approx(float(image.tera), rel=0.01)


def test_padding_of_a_gated_mlp_is_not_counted(inspect: Any) -> None:
    """3420 columns are computed as 3456."""
    (tower,) = [tower for tower in PUBLISHED if tower.name == "Qwen2.5-VL-7B-Instruct"]
    report = inspect(tower)
    assert report["config"]["mlp_hidden"] == 3420
    (mlp,) = [node for node in report["graph"]["nodes"] if node["block"] == 0 and node["kind"] == "mlp"]
    assert mlp["flops"] == 3 * 2 * 1024 * 1280 * 3420
    assert report["graph"]["parameters"] < 677e6


def test_only_needed_blocks_are_counted(inspect: Any) -> None:
    """LLaVA takes the rows after block 23 of 24: 290.9 of 303.5 million published parameters."""
    (tower,) = [tower for tower in PUBLISHED if tower.name == "llava-1.5-7b-hf"]
    report = inspect(tower)
    built = report["graph"]["parameters"] - sum(node["parameters"] for node in list_nodes(report, projector=True))
    assert round_as("290.9", built / 1e6) == "290.9"
    assert {node["block"] for node in report["graph"]["nodes"]} - {None} == set(range(23))


def test_native_and_converted_checkpoint_are_one_tower(inspect: Any) -> None:
    converted, native = (inspect(tower) for tower in PUBLISHED if tower.name.lower().startswith("pixtral-12b"))
    for report in (native, converted):
        del report["config"]["family"]
    assert native["graph"]["parameters"] == converted["graph"]["parameters"]
    assert native["images"] == converted["images"]
