"""The table of supported models: complete, and consistent with the towers."""

import json

import pytest
from support.published import PUBLISHED

from tritontower import cli
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.dequantize import SUPPORTED_SCHEMES
from tritontower.models.common.catalog import CatalogEntry, catalog, families_table, weight_formats
from tritontower.models.common.registry import list_summaries, model_types, read_family


@pytest.fixture(scope="module")
def entries() -> dict[str, CatalogEntry]:
    return {entry.title: entry for entry in catalog()}


def test_table_has_a_complete_row_per_family(entries: dict[str, CatalogEntry]) -> None:
    table, _, formats = families_table().partition("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + len(entries)
    assert {len(line.strip("|").split("|")) for line in lines} == {9}
    assert not [line for line in lines if "|  |" in line]
    assert formats == weight_formats()
    assert all(scheme in formats for scheme in SUPPORTED_SCHEMES)


def test_every_summary_and_every_model_type_is_listed(entries: dict[str, CatalogEntry]) -> None:
    assert list(entries) == [summary.title for summary in list_summaries()]
    assert {model_type for entry in entries.values() for model_type in entry.model_types} == set(model_types())


def test_model_types_belong_to_the_row_of_their_prefix(entries: dict[str, CatalogEntry]) -> None:
    assert entries["Qwen3-VL"].model_types == ("qwen3_vl", "qwen3_vl_moe")
    assert entries["Qwen3.5"].model_types == ("qwen3_5", "qwen3_5_moe")
    assert entries["Gemma 3"].model_types == ("gemma3",)
    assert entries["ShieldGemma 2"].model_types == ("shieldgemma2",)
    native = {title for title, entry in entries.items() if entry.format == "Mistral"}
    assert native == {title for title, entry in entries.items() if entry.model_types == ("params.json",)}
    assert {entry.format for entry in entries.values()} == {"transformers", "Mistral"}


def test_tokens_match_the_published_numbers(entries: dict[str, CatalogEntry]) -> None:
    published = {
        read_family(ConfigReader(tower.config, tower.summary.config_file)).config: tower.images
        for tower in PUBLISHED
        if tower.images
    }
    compared = set()
    for summary in list_summaries():
        if images := published.get(read_family(summary.reader).config):
            assert {image.side: image.tokens for image in images} == entries[summary.title].counted
            compared.add(summary.title)
    assert compared >= {"Gemma 3", "PaliGemma", "LLaVA", "LLaVA-OneVision", "Pixtral"}


class TestCommand:
    def test_prints_a_line_per_family(
        self, entries: dict[str, CatalogEntry], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["families"]) == 0
        output = capsys.readouterr().out
        for title, entry in entries.items():
            (line,) = [line for line in output.splitlines() if line.startswith(f"{title}  ")]
            assert line.split()[-1] == f"{entry.counted[1024]:,}"
        assert weight_formats() in output

    def test_prints_markdown(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["families", "--markdown"]) == 0
        assert capsys.readouterr().out == f"{families_table()}\n"

    def test_prints_json(self, entries: dict[str, CatalogEntry], capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["families", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [entry["title"] for entry in report] == list(entries)
        (gemma,) = [entry for entry in report if entry["title"] == "Gemma 3"]
        assert gemma["counted"] == {"448": 256, "1024": 256}
        assert gemma["model_types"] == ["gemma3"]

    def test_rejects_two_forms(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["families", "--json", "--markdown"]) == 2
        assert "not allowed with" in capsys.readouterr().err
