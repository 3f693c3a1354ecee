"""``docs/adding-a-family.md`` is true: its two files, dropped into place, make a family that passes every tower's tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-a-family.md"
FILES = ("tritontower/models/lantern.py", "tests/support/towers/lantern.py")

# Where the two files lie beside their packages instead of in them.
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
    """A folder with the files that the page shows, where it says they belong."""
    folder = tmp_path_factory.mktemp("lantern")
    shown = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert tuple(name for name, _ in shown) == FILES
    for name, code in shown:
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(code, encoding="utf-8")
    (folder / "with_lantern.py").write_text(PLUGIN, encoding="utf-8")
    return folder


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, (checkout, ROOT, ROOT / "tests")), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


def test_the_family_passes_what_every_tower_is_held_to(checkout: Path) -> None:
    tests = ("tests/models/test_every_model.py", "-k", "lantern", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    finished = run(checkout, "-m", "pytest", "-p", "with_lantern", *tests)
    assert finished.returncode == 0, finished.stdout[-4000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    # Each promise once, half precision twice, every other configuration once.
    assert passed is not None
    assert int(passed[1]) >= 16, finished.stdout[-4000:]


def test_a_tower_of_the_example_is_described_and_catalogd(checkout: Path) -> None:
    code = """
import with_lantern; with_lantern.pytest_configure(None)
from tritontower.models.common.catalog import catalog
(entry,) = [entry for entry in catalog() if entry.title == "Lantern"]
print(entry.model_types, entry.format, dict(entry.counted))
from tritontower.errors import ConfigError
from tritontower.models.common.registry import lantern
from tritontower.checkpoint.config_reader import ConfigReader
try:
    lantern.read(ConfigReader({**lantern.SUMMARIES[0].example, "wick": {"join": 3, "output": 8}}))
except ConfigError as error:
    print(error)
"""
    finished = run(checkout, "-c", code)
    assert finished.returncode == 0, finished.stderr[-4000:]
    listed, refused = finished.stdout.splitlines()
    assert listed == "('lantern',) transformers {448: 64, 1024: 64}"
    assert refused == "config.json: wick.join must be a number that divides the 16 patches on a side, got 3"


def test_the_shown_code_is_in_the_house_style(checkout: Path) -> None:
    pytest.importorskip("ruff")
    configuration = ("--config", str(ROOT / "pyproject.toml"))
    family = str(checkout / FILES[0])
    assert run(checkout, "-m", "ruff", "check", "--no-cache", *configuration, family).returncode == 0
    for name in FILES:
        checked = run(checkout, "-m", "ruff", "format", "--check", "--no-cache", *configuration, str(checkout / name))
        assert checked.returncode == 0, checked.stdout


def test_without_its_file_there_is_no_such_family() -> None:
    from tritontower.models.common.registry import model_types

    assert "lantern" not in model_types()
