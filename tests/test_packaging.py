"""The wheel, an editable install, and the bare checkout all work.

Everything happens in a copy of the checkout, because building leaves files there and other tests run at the same time.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import tritontower
from tritontower.cli.env import SUPPORTED

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")

# Prints the files of the package and of a kernel.
WHERE = (
    "import tritontower, tritontower.kernels.rowwise.norm as norm; print(tritontower.__file__); print(norm.__file__)"
)


def _run(*command, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env = clean | {name: str(value) for name, value in environment.items()}
    return subprocess.check_output([*map(str, command)], cwd=cwd, env=env, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo-output")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    _run(*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, checkout, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


class TestMetadata:
    def test_versions_agree(self):
        assert PROJECT["project"]["version"] == tritontower.__version__

    def test_supported_releases_are_the_dependencies(self):
        bounds = dict(
            re.fullmatch(r"([\w-]+)([^;]*).*", dependency).groups() for dependency in PROJECT["project"]["dependencies"]
        )
        assert {name: bounds[name] for name in SUPPORTED} == SUPPORTED

    def test_every_package_is_listed(self):
        folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tritontower").glob("**/__init__.py")}
        listed = set(PROJECT["tool"]["setuptools"]["packages"])
        kernels = {f"tritontower.kernels.{path.parent.name}" for path in (ROOT / "kernels").glob("*/*.py")}
        assert listed == {".".join(folder.parts) for folder in folders} | {"tritontower.kernels"} | kernels


class TestWheel:
    def test_holds_the_package_and_nothing_else(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            shipped = {name: archive.read(name) for name in archive.namelist()}
        information = f"tritontower-{tritontower.__version__}.dist-info"
        assert {name.split("/")[0] for name in shipped} == {"tritontower", information}
        assert shipped[f"{information}/top_level.txt"].decode().split() == ["tritontower"]
        assert b"Apache License" in shipped[f"{information}/licenses/LICENSE"]
        entries = configparser.ConfigParser()
        entries.read_string(shipped[f"{information}/entry_points.txt"].decode())
        assert entries["console_scripts"]["tritontower"] == "tritontower.cli:main"
        files = [path for suffix in ("*.py", "*.json", "py.typed") for path in (ROOT / "tritontower").rglob(suffix)]
        expected = {
            path.relative_to(ROOT).as_posix() for path in files if "kernels" not in path.relative_to(ROOT).parts
        }
        kernels = [path for suffix in ("*.py", "*.json") for path in (ROOT / "kernels").rglob(suffix)]
        expected |= {f"tritontower/{path.relative_to(ROOT).as_posix()}" for path in kernels}
        assert expected <= shipped.keys()
        assert len(expected) > 20

    def test_works_away_from_the_checkout(self, wheel, tmp_path):
        target = tmp_path / "site"
        _run(*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel, cwd=tmp_path)
        # -I: neither the current folder nor PYTHONPATH may help.
        code = f"import sys; sys.path.insert(0, {str(target)!r}); {WHERE}"
        package, norm = _run(sys.executable, "-I", "-c", code, cwd=tmp_path).split()
        assert Path(package) == target / "tritontower" / "__init__.py"
        assert Path(norm) == target / "tritontower" / "kernels" / "rowwise" / "norm.py"


class TestEditable:
    def test_works_away_from_the_checkout(self, checkout, tmp_path):
        environment = tmp_path / "environment"
        _run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
        python = environment / "bin" / "python"
        # The fresh environment borrows pip, setuptools and torch from this one, but not an installation of this project:
        # the finder of an editable one has the same module name as the one under test.
        borrowed = tmp_path / "borrowed"
        borrowed.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "tritontower" not in entry.name:
                (borrowed / entry.name).symlink_to(entry)
        _run(python, *PIP[1:], "install", *OFFLINE, "--editable", checkout, cwd=tmp_path, PYTHONPATH=borrowed)
        package, norm = _run(python, "-c", WHERE, cwd=tmp_path, PYTHONPATH=borrowed).split()
        assert Path(package) == checkout / "tritontower" / "__init__.py"
        assert Path(norm).resolve() == checkout / "kernels" / "rowwise" / "norm.py"
        command = environment / "bin" / "tritontower"
        assert tritontower.__version__ in _run(command, "--version", cwd=tmp_path, PYTHONPATH=borrowed)


class TestCheckout:
    def test_works_uninstalled(self, checkout):
        output = _run(sys.executable, "-m", "tritontower", "--help", cwd=checkout)
        assert output.startswith("usage: tritontower")
        package, norm = _run(sys.executable, "-c", WHERE, cwd=checkout).split()
        assert Path(package) == checkout / "tritontower" / "__init__.py"
        assert Path(norm).resolve() == checkout / "kernels" / "rowwise" / "norm.py"
