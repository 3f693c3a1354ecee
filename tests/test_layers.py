"""Import order, packages without cycles, public access from the tests, and a package that is quick to import."""

import ast
import os
import sys
from graphlib import TopologicalSorter

import pytest
from support.layers import LEVEL
from support.processes import ROOT, run_python

PACKAGE = ROOT / "tritontower"
KERNELS = ROOT / "kernels"
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)

# Beside the standard library; numpy only because Triton's interpreter computes in it.
KERNEL_DEPENDENCIES = {"torch", "triton", "numpy"}
MAX_LOOSE_MODULES = 10
MAX_PRIVATE_READS = 20


def list_imports(path, module):
    """Yields the absolute names of all imports of a file, except those for the type checker only."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in list_runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def list_runtime_nodes(tree):
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from list_runtime_nodes(node)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_package(name):
    """Returns ``x`` for ``tritontower.x.y``; ``None`` for the package itself, whose names are imported on first use."""
    parts = name.split(".")
    return parts[1] if parts[0] == "tritontower" and len(parts) > 1 and parts[1] in LEVEL else None


def list_private_names(path):
    """Yields the private functions, classes, variables and attributes that a file defines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node, "name", None) or getattr(node, "attr", None) or getattr(node, "id", None)
        defines = isinstance(node, (ast.FunctionDef, ast.ClassDef)) or isinstance(getattr(node, "ctx", None), ast.Store)
        if defines and isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
            yield name


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
        text = path.read_text(encoding="utf-8")
        # An absolute name would not survive being vendored under another one.
        assert "import tritontower" not in text
        assert "from tritontower" not in text
        assert all(node.level < 3 for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom))
        for name in list_imports(path, f"{siblings}{path.parent.name}.{path.stem}"):
            top = name.split(".")[0]
            assert name.startswith(siblings) or top in KERNEL_DEPENDENCIES or top in sys.stdlib_module_names, name


class TestDirection:
    def test_every_module_has_a_row(self):
        modules = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} - {"__init__"}
        assert modules - LEVEL.keys() == set(), "add the module to a row of LAYERS"
        assert len([*PACKAGE.glob("*.py")]) <= MAX_LOOSE_MODULES

    @pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_imports_point_downward(self, path):
        module = module_name(path)
        own = top_package(module)
        for name in list_imports(path, module):
            assert name.split(".")[0] not in {"kernels", "tests", "support", "bench", "conftest"}, name
            other = top_package(name)
            # Peers do not import each other, and the package itself imports nothing at once.
            assert other is None or other == own or (own is not None and LEVEL[other] < LEVEL[own]), name

    def test_the_check_sees_upward_imports(self, tmp_path):
        path = tmp_path / "graph.py"
        path.write_text("def f():\n    from ..tower import VisionTower\n    from .. import cli\n    import torch.nn\n")
        found = list(list_imports(path, "tritontower.graph.ir"))
        assert found == ["tritontower.tower.VisionTower", "tritontower.cli", "torch.nn"]

    def test_no_import_cycles_within_tuning(self):
        # Cycles of packages would point upward somewhere.
        names = {path: module_name(path) for path in FILES if "tuning" in path.parts}
        known, imports = {*names.values()}, {}
        for path, name in names.items():
            targets = {module for target in list_imports(path, name) for module in (target, target.rpartition(".")[0])}
            imports[name] = (targets & known) - {name, "tritontower.tuning"}
        assert len(imports) > 5
        TopologicalSorter(imports).prepare()


class TestTests:
    def test_no_test_module_imports_another(self):
        modules = {path.stem for path in TESTS if path.name.startswith("test_")}
        for path in TESTS:
            for name in list_imports(path, path.stem):
                assert not modules & set(name.split(".")), f"{path.name} imports {name}"

    def test_private_attributes_are_read_in_few_places(self):
        private = {name for path in (*FILES, *KERNELS.rglob("*.py")) for name in list_private_names(path)}
        found = []
        for path in TESTS:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Attribute) or node.attr not in private:
                    continue
                if not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls", "torch", "sys"}):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
        assert len(found) <= MAX_PRIVATE_READS, "\n".join(found)


class TestImporting:
    @pytest.mark.parametrize(
        ("code", "allowed"),
        [
            ("import tritontower", ""),
            ("from tritontower.cli import main; assert main(['--help']) == 0", ""),
            # Every public name.
            ("from tritontower import *", "torch triton numpy PIL safetensors huggingface_hub tqdm"),
            # Imports no engine, and transformers only when it is used.
            (
                "from tritontower.integrations import vllm, sglang, exllama, transformers; assert transformers.load_vlm",
                "torch triton numpy PIL safetensors huggingface_hub tqdm",
            ),
        ],
    )
    def test_loads_nothing_heavier_than_needed(self, code, allowed):
        loaded = (
            run_python("-c", f"import sys; {code}; print(); print(*sys.modules)", environment={}, check=True)
            .stdout.splitlines()[-1]
            .split()
        )
        heavy = {"torch", "triton", "transformers", "numpy", "PIL", "safetensors"}
        heavy |= {"huggingface_hub", "tqdm", "matplotlib"}
        assert heavy & {*loaded} <= {*allowed.split()}
        assert allowed or len([name for name in loaded if "tritontower" in name]) < 30

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
        assert run_python("-c", code, environment={"TRITON_INTERPRET": "1"}).stdout.strip() == "[]"
