"""Digest of the source that decides how a kernel runs; a table's entry applies only to the source it was measured with.

The digest covers every definition and constant of the kernel's module and of the kernel modules that it imports, directly or
not.  It leaves out statements that cannot change a launch with a given configuration: imports, ``__all__``, references in
PyTorch, argument checks and default configurations.  Comments, docstrings, layout and f-strings
(messages) have no effect.  Everything else counts: ignoring a valid entry costs time, applying a wrong one is unsafe.
"""

import ast
import hashlib
import re
from functools import lru_cache
from pathlib import Path

import tritontower.kernels

from .schema import KERNEL_NAME

_SKIPPED_MODULES = re.compile(
    r"runtime\.(_triton|dispatch|interpreter|registry)|gemm\.(cpu|vendor)|\w+\.torch_reference"
)
"""Modules that decide nothing of a launch on a GPU."""

_SKIPPED_NAMES = re.compile(r"__all__|_?check\w*|_?validate\w*|_?default_config|choose_config|\w+_reference_?")
"""Definitions that decide nothing of a launch whose configuration is given."""


def kernels_folder() -> Path:
    """Returns the folder of the kernel modules."""
    return Path(next(iter(tritontower.kernels.__path__)))


@lru_cache
def source_digest(kernel: str, folder: Path | None = None) -> str | None:
    """Returns 12 hexadecimal digits for a kernel such as ``"gemm.linear"``, or ``None`` if there is no such module.

    ``folder`` holds the kernel modules; by default :func:`kernels_folder`.
    """
    folder = folder or kernels_folder()
    if (
        KERNEL_NAME.fullmatch(kernel) is None
        or _SKIPPED_MODULES.fullmatch(kernel)
        or not _path(kernel, folder).is_file()
    ):
        return None
    digest = hashlib.sha256()
    for module, tree in sorted(_imported_modules(kernel, folder).items()):
        for node in tree.body:
            if _counts(node):
                digest.update(f"{module}\n{ast.unparse(_Stripped().visit(node))}\n".encode())
    return digest.hexdigest()[:12]


def _path(module: str, folder: Path) -> Path:
    return folder.joinpath(*module.split(".")).with_suffix(".py")


def _imported_modules(kernel: str, folder: Path) -> dict[str, ast.Module]:
    """Parses the kernel's module and all kernel modules that it imports, directly or not."""
    found: dict[str, ast.Module] = {}
    waiting = [kernel]
    while waiting:
        module = waiting.pop()
        if module in found or _SKIPPED_MODULES.fullmatch(module) or not _path(module, folder).is_file():
            continue
        found[module] = ast.parse(_path(module, folder).read_text(encoding="utf-8"))
        for node in ast.walk(found[module]):
            if isinstance(node, ast.ImportFrom) and node.level:
                # One dot is the module's own package, two dots are the folder of the kernels.
                package = module.split(".")[:-1] if node.level == 1 else []
                base = [*package, *filter(None, [node.module])]
                waiting += [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
    return found


def _counts(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_docstring(node):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [ast.unparse(target) for target in targets] or [getattr(node, "name", "")]
    return not all(_SKIPPED_NAMES.fullmatch(name) for name in names)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


class _Stripped(ast.NodeTransformer):
    """Removes docstrings and the texts of f-strings."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if _is_docstring(node) else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")
