"""What an entry of a table was found for: a digest of the code that decides how a kernel runs.

It covers every definition and constant of the kernel's file and of the siblings that it imports (and they import), but for
what cannot change a launch whose configuration is given: imports, lists of names, references in PyTorch, checks of
arguments, default configurations, and lists of what is compiled ahead.  Comments, docstrings, layout and the texts of
messages have no say.  Whatever is not known to be harmless counts: a table that is ignored without need costs time, and
one that is wrongly believed gives configurations that were never checked.
"""

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .tables_schema import KERNEL_NAME

__all__ = ["source_digest"]

_OTHER_FILES = re.compile(r"_triton|cpu|vendor|dispatch|interpreter|source_digest|tables|tables_schema|\w+_reference")
"""Siblings that decide nothing of a launch on a GPU: backends, CPU products, this package's way of finding tables."""
_HARMLESS = re.compile(
    r"__all__|_?check\w*|_?validate\w*|_?default_config|choose_config|describe|CompileSpec|_?compile_specs?|\w+_specs?"
    r"|operand_types|TRITON_TYPES|\w+_reference_?"
)
"""Definitions that decide nothing of a launch whose configuration is given."""


@lru_cache
def source_digest(kernel: str) -> str | None:
    """12 hexadecimal digits of what decides how ``kernel`` runs; ``None`` where there is no such kernel file."""
    folder = Path(__file__).parent.parent
    if KERNEL_NAME.fullmatch(kernel) is None:
        return None
    family = _family(kernel, folder)
    if not family:
        return None
    digest = hashlib.sha256()
    for name in sorted(family):
        text = next(folder.glob(f"*/{name}.py")).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if _counts(node):
                digest.update(f"{name}\n{' '.join(_words(text, node))}\n".encode())
    return digest.hexdigest()[:12]


def _family(kernel: str, folder: Path) -> set[str]:
    """The kernel file and the siblings that it imports, directly or not, by name; without those that decide nothing."""
    found: set[str] = set()
    waiting = [kernel]
    while waiting:
        name = waiting.pop()
        path = next(folder.glob(f"*/{name}.py"), None)
        if name in found or _OTHER_FILES.fullmatch(name) or path is None:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                waiting += [(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)]
    return found


def _counts(node: ast.stmt) -> bool:
    """Whether a statement of a module may change a launch."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return False
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return False
    if isinstance(node, ast.Assign):
        names = [ast.unparse(target) for target in node.targets]
    elif isinstance(node, ast.AnnAssign):
        names = [ast.unparse(node.target)]
    else:
        names = [getattr(node, "name", "")]
    return not all(_HARMLESS.fullmatch(name) for name in names)


_LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip


def _words(text: str, node: ast.stmt) -> Iterator[str]:
    """The tokens of a definition that mean something, the same under every Python version."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    lines = "\n".join(text.split("\n")[first - 1 : node.end_lineno])
    # Docstrings say nothing to the compiler, and formatted texts, which are tokens of another kind in every release, are
    # there for messages.
    depth, previous = 0, tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(lines).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":
            depth += 1
        elif name == "FSTRING_END":
            depth -= 1
        elif token.type == tokenize.STRING:
            formatted = "f" in re.match(r"\w*", token.string)[0].lower()  # type: ignore[index]
            starts = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
            if not depth and not formatted and not (starts and token.string.lstrip("rR").startswith('"""')):
                yield token.string
        elif not depth and token.type not in _LAYOUT:
            yield token.string
        if token.type != tokenize.COMMENT:
            previous = token.type
