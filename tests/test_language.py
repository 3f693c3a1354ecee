"""Keeps private language out of docstrings, comments, messages and pages: see ``CONTRIBUTING.md``."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tritontower", "kernels", "bench", "examples", "tests", "docs")
FILES = [
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md"}
    and not (folder == "tritontower" and "kernels" in path.relative_to(ROOT).parts)
    and path != Path(__file__)
]
FILES = [*sorted(FILES), ROOT / "README.md", ROOT / "CHANGELOG.md"]

# Banned word → what the field says.
BANNED = {
    r"pictures?": "image",
    r"(?<![.`\"'/_])(?-i:[Cc]lips?)(?![`\"'/_.(-])": "video (CLIP is a model)",
    r"(a|the|each|one|every|this|that|same|another|per|of) packs?": "batch",
    r"(?<!dot )(?<!outer )(?<!Cartesian )(?<!Kronecker )products?(?! brief)": "matmul or GEMM",
    r"stabili[sz]ers?": "softmax offset",
    r"faulty|repair(s|ed|ing)?": "overflowed, recompute",
    r"one[ -]shot": "single block",
    r"recipes?": "weight map",
    r"arrangements?": "weight layout",
    r"temporaries": "workspace",
    r"rehears\w*": "AOT compile",
    r"shortcuts?": "fast path",
    r"rivals?|held against|holds? it against": "baseline, compared with",
    r"facts?": "metadata",
    r"kin": "variants",
    r"extents?": "valid rows",
    r"catalogues?|colours?|grey|behaviours?|neighbours?|centred?|spelt": "American spelling",
    r"(normal|quant|special|initial|serial|optim|recogn|organ|util|minim|maxim|memo|synchron|summar|token)is(e[drs]?|ing|ations?)": (
        "American spelling"
    ),
    r"behind": "after",
    r"in front": "before",
    r"none that": "not",
    r"but for": "except",
    r"works? off": "processes",
    r"has no say|have no say": "has no effect",
    r"vouch(es)?|owes?|hears?": "no personification",
}
PATTERN = re.compile("|".join(rf"\b(?:{words})\b" for words in BANNED), re.IGNORECASE)
RIDDLE = re.compile(r"(What|Whether|Where|How|Who|Which|Why|When)\b")
LONGEST_SENTENCE = 20
LONGEST_TEST_NAME = 60


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of everything that a person reads: pages whole, of code its strings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        fence = False  # tables hold data, such as the name of the family "clip"
        for number, line in enumerate(text.splitlines(), 1):
            fence ^= line.lstrip().startswith("```")
            if not fence and not line.startswith("|"):
                yield number, re.sub(r"`[^`]*`", "", line)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in {"STRING", "COMMENT", "FSTRING_MIDDLE"} and (" " in token.string or name == "COMMENT"):
            yield token.start[0], re.sub(r"`[^`]*`", "", token.string)


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_uses_the_terms_of_the_field(path: Path) -> None:
    found = [f"{line}: {match[0]}" for line, text in _prose(path) for match in PATTERN.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_docstrings_start_with_a_short_statement(path: Path) -> None:
    for line, text in _docstrings(path):
        first = re.split(r"(?<=[.:;!?])\s|\n\n", text, maxsplit=1)[0]
        assert not RIDDLE.match(first), f"line {line}: {first}"
        assert len(first.split()) <= LONGEST_SENTENCE, f"line {line}: {first}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_test_names_are_short(path: Path) -> None:
    names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name.startswith("test_") and len(name) > LONGEST_TEST_NAME] == []


@pytest.mark.parametrize("text", ["two pictures", "a clip", "spelt so", "what is behind it", "normalised"])
def test_the_check_finds_banned_words(text: str) -> None:
    assert PATTERN.search(text)
