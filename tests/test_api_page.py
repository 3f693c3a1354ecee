"""``docs/api.md`` is what the docstrings say today, and leaves out nothing that the package exports."""

import inspect
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import tritontower

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def make_api() -> ModuleType:
    spec = spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(make_api: ModuleType) -> str:
    return make_api.page()


def test_the_page_is_current(make_api: ModuleType, page: str) -> None:
    assert make_api.PAGE.read_text(encoding="utf-8") == page, "run `python docs/make_api.py`"


def test_everything_that_the_package_exports_has_a_section(page: str) -> None:
    headings = re.findall(r"^### `(\w+)`$", page, re.MULTILINE)
    assert set(tritontower.__all__) - {"__version__"} <= set(headings)
    assert len(set(headings)) == len(headings), "links need one heading for each name"


def test_what_arguments_and_results_are_has_a_section(page: str) -> None:
    for name in ("CaptureLimits", "Workload", "Description", "MemoryPlan", "Limits", "BatchForm"):
        assert f"### `{name}`" in page, name


def test_public_methods_have_theirs(page: str) -> None:
    methods = {
        f"VisionTower.{name}"
        for name, member in vars(tritontower.VisionTower).items()
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))
    }
    assert methods <= set(re.findall(r"^#### `([\w.]+)`$", page, re.MULTILINE))


def test_links_lead_to_headings(page: str) -> None:
    headings = {heading.lower() for heading in re.findall(r"^#+ `([\w.]+)`$", page, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert len(links) > 5
    assert links <= headings


def test_signatures_are_those_of_the_code(page: str) -> None:
    from tritontower.mrope import mrope_positions

    (shown,) = re.findall(r"```python\n(mrope_positions\(.*?)\n```", page, re.DOTALL)
    names = re.findall(r"^    (\w+):", shown, re.MULTILINE)
    assert names == list(inspect.signature(mrope_positions).parameters)


def test_a_context_manager_is_shown_as_one(page: str) -> None:
    assert "vision_attention(model: torch.nn.Module) -> AbstractContextManager[list[str]]" in page
    assert "**Yields**\n\nThe `model_type`" in page


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("One.\n\nArgs:\n    a: first,\n        on two lines.\n    b, c: others.", "- `a`: first, on two lines.\n- `b`, `c`: others."),
        ("One.\n\nReturns:\n    Text: with a colon of its own.", "**Returns**\n\nText: with a colon of its own."),
        ("See ``a_b`` and :meth:`~x.Known` at <image>, *once* * 2.", "See `a_b` and [`Known`](#known) at \\<image>, *once* \\* 2."),
        ("Two:\n\n* one,\n  still;\n* two.", "Two:\n\n- one, still;\n- two."),
        ("So:\n\n====  ====\na     *b*\n====  ====\n", "So:\n\n```text\n====  ====\na     *b*\n====  ====\n```"),
        ("So::\n\n    code(1)\n\nand on.", "So:\n\n```python\ncode(1)\n```\n\nand on."),
    ],
)  # fmt: skip
def test_docstrings_become_markdown(make_api: ModuleType, docstring: str, markdown: str) -> None:
    assert markdown in make_api._markdown(docstring, {"Known"})
