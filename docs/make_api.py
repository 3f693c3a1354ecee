"""Writes ``docs/api.md``, the reference of the public Python API, from signatures and docstrings.

    python docs/make_api.py

Sources are parsed, not imported: the page is the same under every version of Python and of the libraries.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

# Module → the names to describe; ``None``: all that it exports.
MODULES: dict[str, tuple[str, ...] | None] = {
    "tower": None,
    "embedding": None,
    "encoding": ("ItemError",),
    "cache": ("EmbeddingCache", "CacheStats"),
    "prompt": None,
    "mrope": None,
    "integrations.transformers": None,
    "integrations.vllm": None,
    "integrations.sglang": None,
    "integrations.exllama": None,
    "config": None,
    "batch": None,
    "graph": ("Workload",),
    "memory": None,
    "description": ("Description",),
    "capture": ("CaptureLimits",),
    "errors": None,
}

INTRODUCTION = """# Python API

Made from the docstrings by `python docs/make_api.py`; edit those. Names that are listed for `tritontower` itself are
imported from there, all others from the module whose heading they stand under. Shapes are in square brackets.
"""

SECTIONS = {
    "Args:": "Arguments",
    "Attributes:": "Attributes",
    "Returns:": "Returns",
    "Yields:": "Yields",
    "Raises:": "Raises",
}
ENTRY = re.compile(r"(?P<names>\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*): (?P<text>.*)", re.DOTALL)
ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`~?([^`]*)`")
CODE_OR_EMPHASIS = re.compile(r"(``.+?``|\*\w+\*)")

Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Module:
    """What the page says of one module: names are in the order in which they are defined."""

    name: str
    docstring: str
    constants: list[tuple[str, str]]
    definitions: list[Definition]

    @classmethod
    def read(cls, name: str, wanted: tuple[str, ...] | None) -> "Module":
        """Reads the module's file, and those that it takes exported names from."""
        tree = _parse(name)
        exported = set(_exported(tree) if wanted is None else wanted)
        bodies = [tree.body]
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level and exported & {alias.name for alias in node.names}:
                package = name.split(".")[: -node.level]
                bodies.append(_parse(".".join([*package, node.module or ""])).body)
        definitions = [node for body in bodies for node in body if _is_public(node, exported)]
        constants = [constant for body in bodies for constant in _constants(body, exported)]
        return cls(name, ast.get_docstring(tree) or "", constants, definitions)


def page() -> str:
    """The whole page."""
    modules = [Module.read(name, wanted) for name, wanted in MODULES.items()]
    known = {node.name for module in modules for node in module.definitions}
    parts = [INTRODUCTION, _overview(modules)]
    for module in modules:
        parts.append(f"## `tritontower.{module.name}`\n\n{_markdown(module.docstring, known)}")
        parts.append("\n".join(f"- `{spelt}`: {_inline(text, known)}" for spelt, text in module.constants))
        parts.extend(_definitions(module.definitions, known))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _parse(module: str) -> ast.Module:
    path = ROOT / "tritontower" / Path(*module.split("."))
    return ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))


def _is_public(node: ast.stmt, exported: set[str]) -> TypeGuard[Definition]:
    return isinstance(node, Definition) and node.name in exported and not _has(node, "overload")


def _constants(body: list[ast.stmt], exported: set[str]) -> Iterator[tuple[str, str]]:
    """Exported constants as they are assigned, and the text below them."""
    for node, following in pairwise(body):
        if not (isinstance(node, ast.Assign) and isinstance(following, ast.Expr)):
            continue
        names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        if isinstance(following.value, ast.Constant) and exported.intersection(names):
            value = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            yield (
                f"{', '.join(names)} = {', '.join(map(_default, value))}",
                inspect.cleandoc(str(following.value.value)),
            )


def _overview(modules: list[Module]) -> str:
    """The names of the package itself, each with its first sentence."""
    found = {node.name: node for module in modules for node in module.definitions}
    names = sorted(name for name in _exported(_parse("__init__")) if name in found)
    rows = [f"| [`{name}`](#{name.lower()}) | {_first_sentence(found[name])} |" for name in names]
    return "\n".join(["## `tritontower`", "", "| | |", "|---|---|", *rows])


def _exported(tree: ast.Module) -> list[str]:
    """The names in a module's ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError("a module of the public API lists its names in __all__")


def _definitions(nodes: list[Definition], known: set[str]) -> Iterator[str]:
    """A section for each, and a list of neighbouring errors that only have a name and a sentence."""
    for plain, group in groupby(nodes, key=_is_plain_error):
        if plain:
            yield "\n".join(f"- **`{node.name}`** ({_bases(node)}): {_one_line(node, known)}" for node in group)
        else:
            for node in group:
                yield from _class(node, known) if isinstance(node, ast.ClassDef) else [_function(node, known, "###")]


def _is_plain_error(node: Definition) -> bool:
    return (
        isinstance(node, ast.ClassDef) and node.name.endswith("Error") and "\n" not in (ast.get_docstring(node) or "")
    )


def _bases(node: Definition) -> str:
    return ", ".join(f"`{ast.unparse(base)}`" for base in node.bases) if isinstance(node, ast.ClassDef) else ""


def _class(node: ast.ClassDef, known: set[str]) -> Iterator[str]:
    methods = [member for member in node.body if isinstance(member, ast.FunctionDef) and not _has(member, "overload")]
    constructors = [member for member in methods if member.name == "__init__"]
    if constructors:
        signature = _call(node.name, constructors[0])
    elif _has(node, "dataclass"):
        signature = _wrapped(node.name, _fields(node))
    else:
        signature = f"class {node.name}" + (f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else "")
    yield f"### `{node.name}`\n\n```python\n{signature}\n```\n\n{_markdown(ast.get_docstring(node) or '', known)}"
    for member in methods:
        if not member.name.startswith("_") and ast.get_docstring(member):
            yield _function(member, known, "####", owner=node.name)


def _fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass that its constructor takes."""
    return [ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]


def _function(node: ast.FunctionDef, known: set[str], level: str, owner: str = "") -> str:
    name = f"{owner}.{node.name}" if owner else node.name
    if _has(node, "property") or _has(node, "cached_property"):
        returns = f": {_annotation(node.returns)}" if node.returns else ""
        signature = f"{name}{returns}"
    else:
        signature = _call(name, node)
    body = _markdown(ast.get_docstring(node) or "", known)
    return f"{level} `{name}`\n\n```python\n{signature}\n```\n\n{body}"


def _has(node: Definition, decorator: str) -> bool:
    return any(ast.unparse(found).partition("(")[0] == decorator for found in node.decorator_list)


def _call(name: str, node: ast.FunctionDef) -> str:
    arguments = node.args
    spelt = [_argument(argument) for argument in [*arguments.posonlyargs, *arguments.args]]
    for place, default in zip(range(len(spelt) - 1, -1, -1), reversed(arguments.defaults), strict=False):
        spelt[place] += f" = {_default(default)}"
    if arguments.posonlyargs:
        spelt.insert(len(arguments.posonlyargs), "/")
    if spelt and spelt[0] in ("self", "cls"):
        del spelt[0]
    if arguments.vararg:
        spelt.append(f"*{_argument(arguments.vararg)}")
    elif arguments.kwonlyargs:
        spelt.append("*")
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        spelt.append(_argument(argument) + (f" = {_default(value)}" if value else ""))
    if arguments.kwarg:
        spelt.append(f"**{_argument(arguments.kwarg)}")
    returns = f" -> {_annotation(node.returns)}" if node.returns and node.name != "__init__" else ""
    if _has(node, "contextmanager"):
        returns = returns.replace("Iterator", "AbstractContextManager", 1)
    return _wrapped(name, spelt, returns)


def _argument(argument: ast.arg) -> str:
    return argument.arg + (f": {_annotation(argument.annotation)}" if argument.annotation else "")


def _annotation(node: ast.expr) -> str:
    """As it is written, and without the quotes of a name that is defined further down."""
    quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return str(ast.literal_eval(node)) if quoted else ast.unparse(node)


def _default(node: ast.expr) -> str:
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return json.dumps(ast.literal_eval(node), ensure_ascii=False) if text else ast.unparse(node)


def _wrapped(name: str, arguments: list[str], returns: str = "") -> str:
    """On one line, or, where it would be long, an argument a line."""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


# -- docstrings → Markdown ----------------------------------------------------------------------------------------------


def _markdown(docstring: str, known: set[str]) -> str:
    """A docstring with its sections as lists."""
    parts = []
    for title, lines in _sections(inspect.cleandoc(docstring).splitlines()):
        if title:
            parts.append(f"**{SECTIONS[title]}**\n")
        is_text = title in ("", "Returns:", "Yields:")
        parts.append(_paragraphs(lines, known) if is_text else _entries(lines, known))
    return "\n".join(parts).strip()


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    title, held = "", list[str]()
    for line in lines:
        if line in SECTIONS:
            yield title, held
            title, held = line, []
        elif title and line and not line.startswith(" "):
            yield title, held
            title, held = "", [line]
        else:
            held.append(line)
    yield title, held


def _paragraphs(lines: list[str], known: set[str]) -> str:
    """Text and its lists, and code where a line ends in two colons."""
    blocks = []
    is_code = False
    for block in re.split(r"\n\s*\n", inspect.cleandoc("\n".join(["", *lines]))):
        if is_code and block.startswith("    "):
            blocks.append(f"```python\n{inspect.cleandoc(block)}\n```")
            continue
        if block.startswith("=="):  # a table, whose columns stand in the source as they are to be read
            blocks.append(f"```text\n{block}\n```")
            continue
        is_code = block.endswith("::")
        items = re.split(r"^\* ", block, flags=re.MULTILINE)
        lead = _inline(items[0].replace("::", ":") if is_code else items[0], known)
        blocks.append("\n".join([*([lead] if lead else []), *(f"- {_inline(item, known)}" for item in items[1:])]))
    return "\n\n".join(blocks) + "\n"


def _entries(lines: list[str], known: set[str]) -> str:
    """``name: what it is`` as a list; text of another form as it is."""
    found: list[str] = []
    for line in inspect.cleandoc("\n".join(["", *lines])).splitlines():
        if line.startswith(" ") and found:
            found[-1] += f" {line.strip()}"
        elif line:
            found.append(line)
    if not all(ENTRY.fullmatch(entry) for entry in found):
        return f"{_inline(' '.join(found), known)}\n"
    items = []
    for entry in found:
        match = ENTRY.fullmatch(entry)
        assert match is not None
        names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
        items.append(f"- {names}: {_inline(match['text'], known)}")
    return "\n".join(items) + "\n"


def _inline(text: str, known: set[str]) -> str:
    """One paragraph on one line: roles and literals as code, nothing else read as markup."""
    text = ROLE.sub(r"``\1``", " ".join(text.split()))
    parts = CODE_OR_EMPHASIS.split(text)
    parts[::2] = [re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [_code(part[2:-2], known) if part.startswith("``") else part for part in parts[1::2]]
    return "".join(parts)


def _code(text: str, known: set[str]) -> str:
    name = text.rpartition(".")[2]
    return f"[`{name}`](#{name.lower()})" if name in known else f"`{text}`"


def _first_sentence(node: Definition) -> str:
    first = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
    return re.split(r"(?<=[.;:])\s", _inline(first, set()))[0].rstrip(".;:")


def _one_line(node: Definition, known: set[str]) -> str:
    return _inline(ast.get_docstring(node) or "", known)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
