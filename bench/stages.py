"""The stages of a campaign on a GPU, in the order of their value; see :mod:`bench.campaign`."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tritontower.benchmarks.images import family_configuration

from .kernel_stages import attention_items, dot_items, gemm_items, peak_items, rope_items
from .runner import ROOT, Item, Row, Setting, Stage
from .stress import stress_items
from .tower_stages import TINY_FAMILY, family_items, gpu_preprocessing_items, gpu_tower_items

__all__ = ["GPU_STAGES"]

# -- tests ------------------------------------------------------------------------------------------------------------


def _test_items(setting: Setting) -> Iterator[Item]:
    """First the tests that need a GPU, file by file; then those whose kernels the other tests interpret."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    if setting.dry:
        yield "test_errors.py", partial(_run_tests, ROOT / "tests" / "test_errors.py", "not slow", setting)
        return
    for path in files:
        if "mark.gpu" in texts[path]:
            yield f"{path.name}, on a GPU", partial(_run_tests, path, "gpu", setting)
    for path in files:
        if re.search(r"\b(kernel_)?device\b", texts[path]) and "kernels" in texts[path]:
            yield f"{path.name}, compiled", partial(_run_tests, path, "not gpu and not slow", setting)


def _run_tests(path: Path, marked: str, setting: Setting) -> Row:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        marked,
        "-x" if setting.dry else "-q",
    ]
    # Plugins that a bare machine lacks are options of the project's configuration.
    command += ["-o", "addopts=--import-mode=importlib", "-W", "ignore::pytest.PytestConfigWarning", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-1000:], flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failing = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    row = {**counts, "failing": failing[:50]}
    # pytest's 5: nothing of the file is marked so.
    if done.returncode not in (0, 5):
        return {"status": "failed", **row}
    if not counts.get("passed"):
        return {"status": "skipped", "reason": f"no test of {path.name} ran here", **row}
    return {"status": "ok", **row}


# -- tuning -----------------------------------------------------------------------------------------------------------


def _tune_items(setting: Setting) -> Iterator[Item]:
    table = setting.folder / "tuned.json"

    def tune(minutes: float) -> Row:
        with family_configuration(TINY_FAMILY) as folder:
            words = ["tune", "--config", str(folder / "config.json")]
            if setting.dry:
                code = exported = _tritontower([*words, "--patches", "64", "--show", "--arch", "sm_90"])
            else:
                code = _tritontower([*words, "--budget", f"{minutes:.1f}", "--patches", "256,1024,4096,16384"])
                exported = _tritontower(["tune", "--export", str(table)])
        return {"status": "ok" if code == exported == 0 else "failed", "code": code, "table": table.name}

    yield "Qwen2-VL", partial(tune, max(1.0, setting.seconds / 60 - 2))


def _tritontower(words: Sequence[str]) -> int:
    """Runs a command, whose output goes to the stage's log."""
    return subprocess.run([sys.executable, "-m", "tritontower", *words], cwd=ROOT, check=False).returncode


GPU_STAGES: tuple[Stage, ...] = (
    Stage("tests", "every test that compiles kernels, on this device", _test_items),
    Stage("peak", "what the vendor's product and a copy reach today", peak_items),
    Stage("attention", "attention against torch's, in every variant", attention_items, interpreted=True),
    Stage("dot16", "what a tensor-core product of 16 columns costs", dot_items, interpreted=True),
    Stage("gemm", "products at the towers' shapes against the vendor's library", gemm_items, interpreted=True),
    Stage("rope", "rotation in the epilogue against its own kernel; norms and gathers", rope_items, interpreted=True),
    Stage("towers", "whole towers against transformers, with memory peaks", gpu_tower_items),
    Stage("preprocessing", "images to patches, and the whole way to embeddings", gpu_preprocessing_items),
    Stage("tune", "the tuner within its budget", _tune_items),
    Stage("stress", "random lengths in the variants that nothing but a GPU can prove", stress_items, interpreted=True),
    Stage("families", "every family at full depth", family_items),
)
"""In the order of their value."""
