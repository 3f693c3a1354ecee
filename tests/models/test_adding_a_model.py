"""The code in ``docs/adding-a-model.md``, put into place, makes a model that passes the tests of every model."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from support.processes import run_python

from tritontower.models.common.registry import model_types

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-a-model.md"
MODEL, DATA = "tritontower/models/lantern.py", "tritontower/models/published/lantern.json"
FILES = (MODEL, DATA, "tests/support/towers/lantern.py")
BLOCK = re.compile(r"`(\S+\.json)`\n\n```json\n(.*?)```|```python\n# (\S+)\n(.*?)```", re.DOTALL)

# Adds a folder with the model's files to the search paths of the packages.
PLUGIN = """
from pathlib import Path

HERE = Path(__file__).parent


def pytest_configure(config):
    import support.towers
    import tritontower.models
    from support.lantern import register

    tritontower.models.__path__.append(str(HERE / "tritontower" / "models"))
    support.towers.__path__.append(str(HERE / "tests" / "support" / "towers"))
    register()
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the files of the page, at the paths that the page gives."""
    folder = tmp_path_factory.mktemp("lantern")
    shown = [(match[1] or match[3], match[2] or match[4]) for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
    assert sorted(name for name, _ in shown) == sorted(FILES)
    for name, code in shown:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    (folder / "with_lantern.py").write_text(PLUGIN, encoding="utf-8")
    return folder


def run(checkout: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    folders = [*map(str, (checkout, ROOT, ROOT / "tests")), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return run_python(*arguments, environment=environment, timeout=500)


def test_model_passes_the_tests_of_every_model(checkout: Path) -> None:
    tests = ("tests/models/test_every_model.py", "-k", "lantern", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    finished = run(checkout, "-m", "pytest", "-p", "with_lantern", *tests)
    assert finished.returncode == 0, finished.stdout[-4000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None
    assert int(passed[1]) >= 16, finished.stdout[-4000:]


def test_catalog_lists_the_model_and_config_errors_name_keys(checkout: Path) -> None:
    code = """
import with_lantern; with_lantern.pytest_configure(None)
from tritontower.models.common.catalog import catalog
(entry,) = [entry for entry in catalog() if entry.title == "Lantern"]
print(entry.model_types, entry.format, dict(entry.counted))
from tritontower.errors import ConfigError
from tritontower.models import lantern
from tritontower.models.common.family import read_summary
from tritontower.checkpoint.config_reader import ConfigReader
try:
    lantern.read(ConfigReader({**read_summary("lantern").example, "wick": {"join": 3, "output": 8}}))
except ConfigError as error:
    print(error.key, error.value, error.allowed)
"""
    finished = run(checkout, "-c", code)
    assert finished.returncode == 0, finished.stderr[-4000:]
    listed, rejected = finished.stdout.splitlines()
    assert listed == "('lantern',) transformers {448: 64, 1024: 64}"
    assert rejected == "wick.join 3 a number that divides the 16 patches on a side"


def test_code_of_the_page_passes_ruff(checkout: Path) -> None:
    pytest.importorskip("ruff")
    configuration = ("--config", str(ROOT / "pyproject.toml"))
    assert run(checkout, "-m", "ruff", "check", "--no-cache", *configuration, str(checkout / MODEL)).returncode == 0
    for name in FILES:
        if name.endswith(".py"):
            checked = run(
                checkout, "-m", "ruff", "format", "--check", "--no-cache", *configuration, str(checkout / name)
            )
            assert checked.returncode == 0, checked.stdout


def test_unregistered_model_is_unknown() -> None:
    assert "lantern" not in model_types()
