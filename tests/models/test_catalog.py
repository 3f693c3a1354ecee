"""The table of families: complete, true to the towers, and the one that the README holds."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.published import PUBLISHED

from tritontower import cli
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.dequantize import SUPPORTED_SCHEMES
from tritontower.models.common.catalog import catalog, families_table, weight_formats
from tritontower.models.common.registry import list_summaries, model_types, read_family

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"


@pytest.fixture(scope="module")
def table() -> str:
    return families_table()


def test_the_readme_holds_the_table_that_is_printed(table: str) -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    held = text.partition(BEGIN)[2].partition(END)[0]
    assert held == f"{table}\n", "put what `tritontower families --markdown` prints between the markers of README.md"


def test_every_row_has_every_cell(table: str) -> None:
    lines = table.partition("\n\n")[0].splitlines()
    widths = {len(line.strip("|").split("|")) for line in lines}
    assert widths == {9}
    assert not [line for line in lines if "|  |" in line]


def test_every_summary_and_every_model_type_is_listed() -> None:
    entries = catalog()
    titles = [summary.title for summary in list_summaries()]
    assert [entry.title for entry in entries] == titles
    assert len(set(titles)) == len(titles)
    assert {model_type for entry in entries for model_type in entry.model_types} == set(model_types())


def test_a_model_type_stands_in_the_row_of_its_kin() -> None:
    types = {entry.title: entry.model_types for entry in catalog()}
    assert types["Qwen3-VL"] == ("qwen3_vl", "qwen3_vl_moe")
    assert types["Qwen3.5"] == ("qwen3_5", "qwen3_5_moe")
    assert (types["Gemma 3"], types["ShieldGemma 2"]) == (("gemma3",), ("shieldgemma2",))


def test_tokens_are_those_of_the_published_checkpoints() -> None:
    """Where the table and the list of published towers know the same checkpoint, they agree."""
    configurations = {read_config(entry.config, entry.file): entry.images for entry in PUBLISHED if entry.images}
    compared = set()
    for entry, summary in zip(catalog(), list_summaries(), strict=True):
        images = configurations.get(read_family(summary.reader).config)
        if images:
            assert {image.side: image.tokens for image in images} == entry.counted
            compared.add(entry.title)
    assert compared >= {"Gemma 3", "PaliGemma", "LLaVA", "LLaVA-OneVision", "Pixtral"}


def read_config(values: Any, source: str) -> Any:
    return read_family(ConfigReader(values, source)).config


def test_formats_are_those_of_the_family() -> None:
    formats = {entry.title: entry.format for entry in catalog()}
    assert set(formats.values()) == {"transformers", "Mistral"}
    assert {title for title, form in formats.items() if form == "Mistral"} == {
        entry.title for entry in catalog() if entry.model_types == ("params.json",)
    }


def test_all_schemes_of_quantization_are_named(table: str) -> None:
    assert table.endswith(weight_formats())
    assert all(scheme in weight_formats() for scheme in SUPPORTED_SCHEMES)


class TestCommand:
    def test_prints_a_line_per_family(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["families"]) == 0
        output = capsys.readouterr().out
        for entry in catalog():
            (line,) = [line for line in output.splitlines() if line.startswith(f"{entry.title}  ")]
            assert line.split()[-1] == f"{entry.counted[1024]:,}"
        assert weight_formats() in output

    def test_prints_the_table(self, table: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["families", "--markdown"]) == 0
        assert capsys.readouterr().out == f"{table}\n"

    def test_prints_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["families", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [entry["title"] for entry in report] == [entry.title for entry in catalog()]
        (gemma,) = [entry for entry in report if entry["title"] == "Gemma 3"]
        assert gemma["counted"] == {"448": 256, "1024": 256}
        assert gemma["model_types"] == ["gemma3"]

    def test_one_form_at_a_time(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["families", "--json", "--markdown"]) == 2
        assert "not allowed with" in capsys.readouterr().err
