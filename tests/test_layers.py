"""The house stays as it was planned: who may import whom, one module per file, and a package that is quick to import."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tritontower"
KERNELS = ROOT / "kernels"

# A module imports only from rows above its own, or from its own package.  A package is one entry; peers do not see each other.
LAYERS = (
    ("errors",),
    ("config", "kernels", "text_table"),
    ("checkpoint", "graph", "devices"),
    ("batch",),
    ("preprocessing", "embedding", "engine"),
    ("cache", "prompt"),
    ("models", "scheduler"),
    ("tower",),
    ("integrations", "parity", "demo"),
    ("benchmarks",),
    ("tuning",),
    ("cli",),
    ("__main__",),
)
LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}
# Beside the standard library; numpy only because Triton's interpreter computes in it.
KERNEL_DEPENDENCIES = {"torch", "triton", "numpy"}


def _imports(path: Path, module: str) -> Iterator[str]:
    """Absolute names of all that the file imports, wherever in the file; not what is for the type checker only."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


def _package_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _level_of(name: str) -> int | None:
    """Row of a ``tritontower.x...`` name; ``None`` for the package itself, whose names are loaded when first used."""
    parts = name.split(".")
    if parts[0] != "tritontower" or len(parts) < 2 or parts[1] not in LEVEL:
        return None
    return LEVEL[parts[1]]


def _run(*arguments: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return process.stdout


class TestKernelFolder:
    def test_is_no_regular_package(self):
        # `kernels` is the import name of a Hugging Face package that transformers looks for.
        assert not (KERNELS / "__init__.py").exists()

    def test_is_found_inside_the_package(self):
        link = PACKAGE / "kernels"
        assert link.is_dir()
        if (ROOT / ".git").exists():
            assert link.is_symlink()
            assert os.readlink(link) == os.path.join("..", "kernels")
        # A copy without links has the same files twice, which is tolerable as long as they are the same.
        assert {path.name for path in link.rglob("*.py")} == {path.name for path in KERNELS.rglob("*.py")}

    @pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
    def test_imports_only_torch_triton_and_siblings(self, path):
        siblings = "tritontower.kernels."
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert all(node.level < 3 for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        for name in _imports(path, f"{siblings}{path.parent.name}.{path.stem}"):
            top = name.split(".")[0]
            relative = name.startswith(siblings)
            assert relative or top in KERNEL_DEPENDENCIES or top in sys.stdlib_module_names, name

    def test_siblings_are_imported_relatively(self):
        # An absolute name would not survive being vendored under another one.
        assert [path.name for path in KERNELS.rglob("*.py") if "import tritontower" in path.read_text("utf-8")] == []
        assert [path.name for path in KERNELS.rglob("*.py") if "from tritontower" in path.read_text("utf-8")] == []


class TestDirection:
    def test_every_module_has_its_place(self):
        modules = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in _package_files()} - {"__init__"}
        assert modules - LEVEL.keys() == set(), "add the module to a row of LAYERS"

    @pytest.mark.parametrize("path", _package_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_imports_point_downward(self, path):
        module = _module_name(path)
        own, level = module.split(".")[1:2], _level_of(module)
        if level is None:  # the package itself imports nothing at once
            level = 0
        for name in _imports(path, module):
            other = _level_of(name)
            assert other is None or other < level or name.split(".")[1:2] == own, name

    @pytest.mark.parametrize("path", _package_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_nobody_imports_the_tests_or_the_kernels_by_their_folder(self, path):
        forbidden = {"kernels", "tests", "support", "bench", "conftest"}
        assert {name.split(".")[0] for name in _imports(path, _module_name(path))} & forbidden == set()

    def test_the_check_sees_upward_imports(self, tmp_path):
        path = tmp_path / "graph.py"
        path.write_text("def f():\n    from ..tower import VisionTower\n    from .. import cli\n    import torch.nn\n")
        found = list(_imports(path, "tritontower.graph.ir"))
        assert found == ["tritontower.tower.VisionTower", "tritontower.cli", "torch.nn"]
        assert all(_level_of(name) > LEVEL["graph"] for name in found[:2])


class TestImporting:
    def test_the_package_is_cheap(self):
        code = "import sys, json; before = set(sys.modules); import tritontower; print(json.dumps(sorted(set(sys.modules) - before)))"
        loaded = json.loads(_run("-c", code))
        assert "tritontower" in loaded
        heavy = {"torch", "triton", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm"}
        assert heavy & {name.split(".")[0] for name in loaded} == set()
        assert len(loaded) < 30, loaded

    def test_its_public_names_load_on_demand_and_without_transformers(self):
        code = (
            "import sys, tritontower\n"
            "assert all(getattr(tritontower, name) is not None for name in tritontower.__all__)\n"
            "print(*(name for name in ('torch', 'transformers', 'matplotlib', 'skimage') if name in sys.modules))"
        )
        assert _run("-c", code).split() == ["torch"]

    def test_top_level_help_loads_nothing_heavy(self):
        code = (
            "import sys; from tritontower.cli import main; code = main(['--help'])\n"
            "assert code == 0; print([n for n in ('torch', 'triton', 'transformers', 'PIL', 'numpy') if n in sys.modules])"
        )
        assert _run("-c", code).splitlines()[-1] == "[]"

    def test_a_kernel_file_is_one_module(self):
        # Two names for one file would mean two modules, hence two caches and two switches.
        code = (
            "import sys, importlib, pathlib\n"
            "for path in sorted(pathlib.Path('kernels').glob('*/[!_]*.py')):\n"
            "    importlib.import_module(f'tritontower.kernels.{path.parent.name}.{path.stem}')\n"
            "files = [m.__file__ for n, m in sys.modules.items() if 'kernels' in n.split('.') and getattr(m, '__file__', None)]\n"
            "real = [str(pathlib.Path(f).resolve()) for f in files]\n"
            "assert len(real) == len(set(real)) > 5, real\n"
            "print([n for n in sys.modules if n == 'kernels' or n.startswith('kernels.')])"
        )
        assert _run("-c", code, TRITON_INTERPRET="1").strip() == "[]"
