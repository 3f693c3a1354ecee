"""What a campaign measures on a GPU, in the order of its value; see :mod:`bench.campaign`."""

import itertools
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.benchmarks.cases import Case, Grid, cases, check
from tritontower.benchmarks.kernels import OURS, measure
from tritontower.benchmarks.pictures import (
    PACKS,
    family_checkpoint,
    family_configuration,
    family_titles,
    noise_pictures,
    pictures_of,
    square,
    summaries,
)
from tritontower.benchmarks.preprocessing import DEFAULT_SIZES, compare_preprocessing
from tritontower.benchmarks.roofline import Roofline, measured_roofline, published_roofline
from tritontower.benchmarks.towers import Pass, compare_times, load_towers, reference_of
from tritontower.kernels import attention_fixed, attention_specialised
from tritontower.kernels.configs import architecture
from tritontower.kernels.flash_attention import FlashAttentionConfig
from tritontower.kernels.linear import LinearConfig
from tritontower.kernels.linear import default_config as default_linear_config
from tritontower.kernels.vendor_product import vendor_takes
from tritontower.measuring import interleaved, time_on_device
from tritontower.random_checkpoint import write_random_checkpoint

from .dot16 import SHAPES, measure_dot
from .runner import ROOT, Item, Setting, Stage

__all__ = ["GPU_STAGES", "TINY_FAMILY", "tower_items"]

Row = dict[str, Any]
TINY_FAMILY = "Qwen2-VL"
"""Whose tower, shrunk to two narrow blocks, a dry run takes."""


def _grid(setting: Setting) -> Grid:
    return "small" if setting.dry else "gpu"


def _yardstick(setting: Setting) -> Roofline:
    """The maker's figures; today's for a device that nobody has published any of."""
    if setting.dry:
        return Roofline(1e12, 1e11, "none: a dry run")
    known = published_roofline(torch.cuda.get_device_name(setting.device))
    return known or measured_roofline(setting.device, torch.bfloat16)


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
    # pytest's 5: nothing of the file is marked so.
    return {"status": "ok" if done.returncode in (0, 5) else "failed", **counts, "failing": failing[:50]}


# -- peak -------------------------------------------------------------------------------------------------------------


def _peak_items(setting: Setting) -> Iterator[Item]:
    device = setting.device

    def product(side: int, dtype: torch.dtype) -> Row:
        small = 64 if setting.dry else side
        found = measured_roofline(device, dtype, side=small, copied_bytes=2**20 if setting.dry else 2 * 2**30)
        return {"status": "ok", "tflops": found.flops / 1e12, "gigabytes_per_second": found.bytes / 1e9}

    def upload(megabytes: int) -> Row:
        size = 2**10 if setting.dry else megabytes * 2**20
        source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.empty(size, dtype=torch.uint8, device=device)
        timing = time_on_device(lambda: target.copy_(source, non_blocking=True), device=device, graph=False)
        return {"status": "ok", "seconds": timing.median, "gigabytes_per_second": size / timing.median / 1e9}

    def launch() -> Row:
        rows = torch.zeros(1, device=device)
        count, start = 1000, time.perf_counter()
        for _ in range(count):
            rows.add_(1)
        host = (time.perf_counter() - start) / count
        return {"status": "ok", "seconds": host}

    for side in (8192, 4096, 16384):
        yield f"product of {side}³, bfloat16", partial(product, side, torch.bfloat16)
    yield "product of 8192³, float16", partial(product, 8192, torch.float16)
    for megabytes in (4, 64, 256):
        yield f"copy of {megabytes} MiB to the device", partial(upload, megabytes)
    yield "launch of one small kernel, on the host", launch


# -- kernels ----------------------------------------------------------------------------------------------------------


def _measure(case: Case, setting: Setting, roofline: Roofline, *, rivals: bool = True) -> Row:
    budget = 0.001 if setting.dry else 0.2
    return measure(case, setting.device, roofline, rivals=rivals, budget_seconds=budget)


def _attention_variants(head_dim: int, longest: int) -> Iterator[dict[str, Any]]:
    """What may win at this head size: the shapes that compile without spills, in every variant that there is."""
    shapes = [(128, 64, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3)]
    if head_dim <= 64:
        shapes.append((128, 128, 4, 2))
    for shape in shapes:
        for variant in ("online", "fixed"):
            yield _attention_fields(shape, variant)
    for shape in ((128, 128, 4, 2), (128, 64, 4, 2), (128, 128, 4, 3)):
        yield _attention_fields(shape, "specialised")
    if longest <= 64:
        yield _attention_fields((64, 64, 4, 1), "one_shot")


def _attention_fields(shape: tuple[int, int, int, int], variant: str) -> dict[str, Any]:
    queries, keys, warps, stages = shape
    return {
        "block_queries": queries,
        "block_keys": keys,
        "num_warps": warps,
        "num_stages": stages,
        "variant": variant,
    }


def _measure_attention(case: Case, chosen: Mapping[str, Any], setting: Setting, roofline: Roofline) -> Row:
    # A configuration that refuses itself is a result of this item, not the end of the stage.
    launched = case.launched(FlashAttentionConfig(**chosen), _words(chosen))
    if why := _falls_back(launched, setting.device):
        return {"kernel": case.kernel, "case": launched.label, "status": "skipped", "reason": why}
    return _measure(launched, setting, roofline, rivals=False)


def _falls_back(case: Case, device: torch.device) -> str | None:
    """Why another variant would run in the place of the configured one; ``None`` if none would."""
    here = architecture(device)
    config: FlashAttentionConfig = case.config
    if config.variant == "fixed" and here not in attention_fixed.ARCHITECTURES:
        return f"the fixed stabiliser is not compiled for {here}"
    if config.variant != "specialised":
        return None
    heads, head_dim = case.sizes["heads"], case.sizes["head_dim"]
    width = case.sizes.get("padded", head_dim)
    q, k, v = torch.empty(1, 3, heads, width, dtype=case.dtype, device=device).unbind(1)
    return attention_specialised.obstacle(q, k, v, head_dim, config, here)


def _words(chosen: Mapping[str, Any]) -> str:
    return "{variant} {block_queries} × {block_keys}, {num_warps} warps, {num_stages} stages".format(**chosen)


def _attention_items(setting: Setting) -> Iterator[Item]:
    roofline = _yardstick(setting)
    found = list(cases(_grid(setting), torch.bfloat16, ["attention"]))
    if setting.dry:
        found = found[:2]
    for case in found:
        yield f"{case.label}, as chosen", partial(_measure, case, setting, roofline)
    # Then every variant at the lengths that tell them apart, the longest first.
    telling = [case for case in found if setting.dry or _tells_apart(case.sizes["lengths"])]
    for case in sorted(telling, key=lambda case: -max(case.sizes["lengths"])):
        longest = max(case.sizes["lengths"])
        bounded = replace(case, sizes={**case.sizes, "length_bound": longest}) if longest <= 64 else case
        variants = list(_attention_variants(case.sizes["head_dim"], longest))
        for chosen in variants[:2] if setting.dry else variants:
            run = partial(_measure_attention, bounded, chosen, setting, roofline)
            yield f"{case.label}, {_words(chosen)}", run


def _tells_apart(lengths: Sequence[int]) -> bool:
    """One long picture, or windows."""
    return list(lengths) in ([4096], [16384]) or set(lengths) == {64}


def _dot_items(setting: Setting) -> Iterator[Item]:
    chosen = list(SHAPES.items())[:2] if setting.dry else list(SHAPES.items())
    for name, shape in chosen:
        for warps in (4,) if setting.dry else (4, 8):
            measure_it = partial(
                measure_dot,
                (16, 16, 16) if setting.dry else shape,
                setting.device,
                products=4 if setting.dry else 4096,
                num_warps=warps,
            )
            yield f"{name}, {warps} warps", measure_it


def _linear_variants(case: Case, device: torch.device) -> Iterator[tuple[str, LinearConfig]]:
    """Only those that run as they are called: what a launch cannot take, it quietly replaces."""
    sizes, here = case.sizes, architecture(device)
    base = default_linear_config(
        sizes["rows"],
        sizes["columns"],
        sizes["inner"],
        dtype=case.dtype,
        activation=sizes["activation"],
        residual=sizes["residual"],
        architecture=here,
    )
    yield "pointers", replace(base, operands="pointers", vendor=False)
    if here in ("sm_90", "sm_100", "interpreter"):
        yield "descriptors", replace(base, operands="descriptors", vendor=False)
    if vendor_takes(torch.empty(0, dtype=case.dtype), sizes["activation"]):
        yield "vendor", replace(base, vendor=True)
    if sizes["activation"] != "silu_gated":
        for tile in ((128, 128, 64, 8, 4, 3), (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (64, 128, 64, 8, 4, 4)):
            rows, columns, inner, group, warps, stages = tile
            config = replace(
                base,
                block_rows=rows,
                block_columns=columns,
                block_inner=inner,
                group_rows=group,
                num_warps=warps,
                num_stages=stages,
                split=1,
                vendor=False,
                operands="pointers",
            )
            yield f"{rows} × {columns} × {inner}, {warps} warps, {stages} stages", config


def _gemm_items(setting: Setting) -> Iterator[Item]:
    roofline = _yardstick(setting)
    found = list(cases(_grid(setting), torch.bfloat16, ["linear", "patch_projection", "projector"]))
    for case in found[:2] if setting.dry else found:
        yield f"{case.kernel}: {case.label}, as chosen", partial(_measure, case, setting, roofline)
    linears = [case for case in found if case.kernel == "linear"]
    for case in linears[:1] if setting.dry else linears:
        for name, config in itertools.islice(_linear_variants(case, setting.device), 3 if setting.dry else None):
            launched = case.launched(config, name)
            yield launched.label, partial(_measure, launched, setting, roofline, rivals=False)


def _rope_items(setting: Setting) -> Iterator[Item]:
    roofline = _yardstick(setting)
    found = cases(_grid(setting), torch.bfloat16, ["qkv_projection", "rope", "norm", "gather"])
    for case in itertools.islice(found, 2 if setting.dry else None):
        yield f"{case.kernel}: {case.label}", partial(_measure, case, setting, roofline)


# -- towers -----------------------------------------------------------------------------------------------------------

TOWER_PATCHES = (1024, 4096, 256, 2304, 15376, 8836, 35344)
"""The first ones are worth the most, should time run out."""


class _Loaded:
    """The tower that was asked for last, and transformers' implementation of it; one at a time."""

    def __init__(self, setting: Setting, dtype: str, depth: int = 0) -> None:
        self.setting, self.dtype, self.depth = setting, dtype, depth
        self.title: str | None = None
        self._stack = ExitStack()

    def get(self, title: str) -> Any:
        """The tower, the same without graphs, transformers, and why it is missing."""
        if self.title != title:
            self.held: Any = None
            self._stack.close()
            if self.setting.device.type == "cuda":
                torch.cuda.empty_cache()
            folder = self._folder(title)
            tower, eager = load_towers(folder, device=self.setting.device, dtype=self.dtype)
            self.held = (tower, eager, *reference_of(tower))
            self.title = title
        return self.held

    def _folder(self, title: str) -> Path:
        if self.setting.dry:
            return tiny_checkpoint(Path(mkdtemp()))
        context = family_checkpoint(title, dtype=getattr(torch, self.dtype), depth=self.depth)
        return self._stack.enter_context(context)


def tiny_checkpoint(folder: Path) -> Path:
    """A tower of two narrow blocks."""
    summary = summaries()[TINY_FAMILY]
    narrow = {**summary.example["vision_config"], "depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 96}
    config = {**summary.example, "vision_config": narrow}
    return write_random_checkpoint(folder / "tiny", config, summary.processor, dtype=torch.bfloat16)


def tower_items(
    setting: Setting,
    plan: Sequence[tuple[str, Sequence[Pass]]],
    *,
    rivals: Sequence[str],
    repeats: int,
    dtype: str = "bfloat16",
    depth: int = 0,
) -> Iterator[Item]:
    """An item for every pass of every tower of ``plan`` (title, passes)."""
    loaded = _Loaded(setting, dtype, depth)

    def run(title: str, name: str, make: Callable[[VisionTower], Any]) -> Row:
        tower, eager, reference, missing = loaded.get(title)
        row = compare_times(
            tower,
            reference,
            make(tower),
            repeats=1 if setting.dry else repeats,
            rivals=rivals,
            eager=eager,
            family=title,
            pack=name,
        )
        row["notes"] = {**row["notes"], **missing}
        return row

    for title, passes in plan:
        for name, make in passes:
            yield f"{title}: {name}", partial(run, title, name, make)


def squares(*counts: int) -> list[Pass]:
    """Passes over one square picture each, or as many views of a fixed size."""
    return [(f"{count} patches", partial(square, patches=count)) for count in counts]


def packs(*names: str) -> list[Pass]:
    """Passes over named packs."""
    return [(name, partial(pictures_of, sizes=PACKS[name])) for name in names]


def _gpu_tower_items(setting: Setting) -> Iterator[Item]:
    plan: Sequence[tuple[str, Sequence[Pass]]] = [
        ("Qwen2-VL", [*squares(*TOWER_PATCHES), *packs("mixed", "small")]),
        ("Qwen2.5-VL", [*squares(4096, 16384, 1024), *packs("mixed")]),
        ("Qwen3-VL", [*squares(1024, 4096, 16384), *packs("mixed")]),
        ("Gemma 3", squares(8 * 4096)),
        ("Pixtral", [*squares(4096), *packs("mixed")]),
        ("Mistral Small 3", squares(12100)),
        ("CLIP", squares(16 * 576)),
    ]
    if setting.dry:
        plan = [(TINY_FAMILY, squares(16, 64))]
    yield from tower_items(setting, plan, rivals=("sdpa",), repeats=15)
    if setting.dry:
        return
    # Compiling takes minutes, and comes last for that.
    compiled: Sequence[tuple[str, Sequence[Pass]]] = [
        ("Qwen2-VL", squares(1024, 4096, 256, 16384)),
        ("Qwen2.5-VL", squares(4096)),
        ("Gemma 3", squares(8 * 4096)),
    ]
    for key, make in tower_items(setting, compiled, rivals=("sdpa", "compile"), repeats=15):
        yield f"{key}, with torch.compile", make


def _family_items(setting: Setting) -> Iterator[Item]:
    titles = [TINY_FAMILY] if setting.dry else family_titles()
    passes = squares(16) if setting.dry else packs("448", "mixed")
    yield from tower_items(setting, [(title, passes) for title in titles], rivals=("sdpa",), repeats=9)


def preprocessing_items(setting: Setting, titles: Sequence[str]) -> Iterator[Item]:
    """Pictures to patches, for towers of several rules of resizing."""
    sizes: Mapping[str, Sequence[tuple[int, int]]] = {"56 × 56": [(56, 56)]} if setting.dry else DEFAULT_SIZES

    def run(title: str, label: str) -> Row:
        with family_configuration(title) as folder:
            tower = VisionTower.from_pretrained(folder, device="cpu", delay_load=True)
            row = compare_preprocessing(tower, label, sizes[label], repeats=2 if setting.dry else 9)
        return {**row, "label": f"{title}: {label}"}

    for title in titles[:1] if setting.dry else titles:
        for label in sizes:
            yield f"{title}: {label}", partial(run, title, label)


def _gpu_preprocessing_items(setting: Setting) -> Iterator[Item]:
    """Making patches, and bringing them to the device as numbers and as bytes."""
    yield from preprocessing_items(setting, ("Qwen2-VL", "Gemma 3", "Pixtral"))

    def encode(label: str) -> Row:
        with ExitStack() as stack:
            folder = (
                tiny_checkpoint(Path(mkdtemp()))
                if setting.dry
                else stack.enter_context(family_checkpoint(TINY_FAMILY, dtype=torch.bfloat16))
            )
            tower = VisionTower.from_pretrained(folder, device=setting.device)
            pictures = noise_pictures([(56, 56)] if setting.dry else DEFAULT_SIZES[label])
            times = interleaved({"encode": lambda: tower.encode(pictures)}, repeats=2, device=setting.device)
        return {"status": "ok", "label": f"encode, {label}", "seconds": {OURS: list(times["encode"].seconds)}}

    for label in ("448 × 448",) if setting.dry else DEFAULT_SIZES:
        yield f"encode, {label}", partial(encode, label)


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


# -- stress -----------------------------------------------------------------------------------------------------------

STRESS_VARIANTS = ("specialised", "fixed", "one_shot", "online")
STRESS_LAUNCHES = 10_000
LAUNCHES_A_DRAW = 4


def _stress_items(setting: Setting) -> Iterator[Item]:
    """Random lengths in every variant and head size; a result has to be right, and the same every time."""
    heads = ((64, 64), (72, 72), (72, 80), (80, 80))
    combinations = list(itertools.product(STRESS_VARIANTS, heads))
    runs = 1 if setting.dry else 5
    draws = 1 if setting.dry else -(-STRESS_LAUNCHES // (LAUNCHES_A_DRAW * runs * 2 * len(heads)))
    for run in range(runs):
        for variant, (head_dim, padded) in combinations:
            if setting.dry and variant == "specialised":
                continue  # nothing but a GPU runs it
            shown = f"{head_dim} of {padded}" if padded > head_dim else f"{head_dim}"
            yield (
                f"{variant}, heads of {shown}, {run}",
                partial(_stress, setting, variant, head_dim, padded, run, draws),
            )


def _stress(setting: Setting, variant: str, head_dim: int, padded: int, seed: int, draws: int) -> Row:
    chance = random.Random(f"{variant} {head_dim} {padded} {seed}")
    launches, worst, limit = 0, 0.0, 0.0
    wrong: list[Row] = []
    for _ in range(draws):
        most = 64 if variant == "one_shot" or setting.dry else chance.choice((64, 200, 700, 3000))
        others = 2 if setting.dry or most > 1000 else 8
        lengths = [chance.randint(0, most) for _ in range(chance.randint(1, others))] + [chance.randint(1, most)]
        shape = (16, 64, 4, 1) if setting.dry else chance.choice(_STRESS_SHAPES[variant])
        config = FlashAttentionConfig(**_attention_fields(shape, variant))
        sizes: dict[str, Any] = {"heads": 1 if setting.dry else chance.choice((1, 3, 16)), "head_dim": head_dim}
        sizes |= {"padded": padded, "lengths": lengths}
        if padded == head_dim:
            sizes["boost"] = chance.choice((1, 1, 4, 40))
        if variant == "one_shot":
            sizes["length_bound"] = 64
        case = Case("attention", variant, torch.bfloat16, sizes, config)
        if why := _falls_back(case, setting.device):
            return {"status": "skipped", "reason": why}
        prepared = case.prepare(setting.device)
        prepared.result().fill_(float("nan"))
        outcome = check(case, prepared, setting.device, most_rows=512)
        first = prepared.result().clone()
        same = True
        for _ in range(LAUNCHES_A_DRAW - 1):
            prepared.result().fill_(float("nan"))
            prepared.call()
            same = same and torch.equal(first, prepared.result())
        launches += LAUNCHES_A_DRAW
        worst, limit = max(worst, outcome.distance), outcome.limit
        if not (outcome.passed and same):
            wrong.append({"lengths": lengths, "config": str(config), "distance": outcome.distance, "same": same})
    facts: Mapping[str, Any] = {"launches": launches, "worst": worst, "limit": limit, "wrong": wrong[:20]}
    return {"status": "failed" if wrong else "ok", "wrong_draws": len(wrong), **facts}


_STRESS_SHAPES = {
    "specialised": [(128, 128, 4, 2), (128, 64, 4, 2)],
    "fixed": [(128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    "one_shot": [(64, 64, 4, 1)],
    "online": [(128, 64, 4, 3), (64, 64, 4, 3)],
}

GPU_STAGES: tuple[Stage, ...] = (
    Stage("tests", "every test that compiles kernels, on this device", _test_items),
    Stage("peak", "what the vendor's product and a copy reach today", _peak_items),
    Stage("attention", "attention against torch's, in every variant", _attention_items, interpreted=True),
    Stage("dot16", "what a tensor-core product of 16 columns costs", _dot_items, interpreted=True),
    Stage("gemm", "products at the towers' shapes against the vendor's library", _gemm_items, interpreted=True),
    Stage("rope", "rotation in the epilogue against its own kernel; norms and gathers", _rope_items, interpreted=True),
    Stage("towers", "whole towers against transformers, with memory peaks", _gpu_tower_items),
    Stage("preprocessing", "pictures to patches, and the whole way to embeddings", _gpu_preprocessing_items),
    Stage("tune", "the tuner within its budget", _tune_items),
    Stage("stress", "random lengths in the variants that nothing but a GPU can prove", _stress_items, interpreted=True),
    Stage("families", "every family at full depth", _family_items),
)
"""In the order of their value."""
