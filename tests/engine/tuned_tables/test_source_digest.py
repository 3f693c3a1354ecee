"""Source digest: everything that decides a launch changes it, and nothing else does."""

import shutil

import pytest

from tritontower.engine.tuned_tables.source_digest import kernels_folder, source_digest

SOURCE = '''
"""Docstring."""
from . import other
from ..runtime.device import f
__all__ = ["LIMIT"]
LIMIT = 3
"""Of what."""
TYPED: int = 3
@triton.jit
def _kernel(x):
    """What it does."""
    # why
    return x  + 1
def launch_it(x):
    raise ValueError(f"no {x}")
class ItConfig:
    rows: int = 1
def helper():
    return 5
def _validate_it(x):
    return 5
def default_config(x):
    return 5
def it_reference(x):
    return 5
'''
OTHER = "@triton.jit\ndef device_function(x):\n    return x\n"


@pytest.fixture
def digest(tmp_path):
    """Digest of a kernel module with two imports."""
    number = 0

    def compute(text: str = SOURCE, second: str = OTHER, third: str = OTHER) -> str | None:
        nonlocal number
        number += 1
        folder = tmp_path / str(number)
        for name, content in (("gemm/it.py", text), ("gemm/other.py", second), ("runtime/device.py", third)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return source_digest("gemm.it", folder)

    return compute


HARMLESS = [
    ("# why", "# for another reason"),
    ("What it does", "What it really does"),
    ("x  + 1", "x + 1"),
    ("from . import other", "import math\nfrom . import other"),
    ('["LIMIT"]', '["LIMIT", "TYPED"]'),
    ('f"no {x}"', 'f"not {x}"'),
    *((f"def {name}(x):\n    return 5", "") for name in ("_validate_it", "default_config", "it_reference")),
]
DECISIVE = [
    ("+ 1", "+ 2"),
    ("int = 1", "int = 2"),
    ("raise ValueError", "raise TypeError"),
    ("LIMIT = 3", "LIMIT = 4"),
    ("TYPED: int = 3", "TYPED: int = 4"),
    ("helper():\n    return 5", "helper():\n    return 6"),
]


@pytest.mark.parametrize(("old", "new"), [*HARMLESS, *DECISIVE])
def test_digest_changes_with_what_decides_a_launch(digest, old, new):
    assert SOURCE.count(old) == 1
    assert (digest(SOURCE.replace(old, new)) == digest()) is ((old, new) in HARMLESS)


def test_imported_modules_change_the_digest(digest):
    changed = OTHER.replace("return x", "return -x")
    assert len({digest(), digest(second=changed), digest(third=changed)}) == 3


@pytest.mark.parametrize(
    ("kernel", "imported"),
    [
        ("gemm.linear", "gemm/linear_config"),
        ("gemm.qkv_projection", "gemm/linear"),
        ("attention.attention", "attention/fixed_max"),
        ("rowwise.norm", "runtime/valid_rows"),
    ],
)
def test_digest_follows_the_real_imports(tmp_path, kernel, imported):
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_folder(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest(kernel)
    assert source_digest(kernel, folder) == before
    path = folder / f"{imported}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nMORE = 1\n", encoding="utf-8")
    source_digest.cache_clear()
    assert source_digest(kernel, folder) not in (None, before)


@pytest.mark.parametrize(
    "name", ["nonsense", "../gemm.linear", "", "gemm.Linear", "a" * 99, "runtime.dispatch", "gemm.torch_reference"]
)
def test_other_names_have_no_digest(name):
    assert source_digest(name) is None
