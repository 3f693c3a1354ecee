"""Quantized vision weights, compared with arithmetic in plain Python, number by number."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tritontower.checkpoint.checkpoint import Checkpoint
from tritontower.errors import (
    CheckpointCorruptError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    TowerError,
    UnexpectedTensorError,
    UnsupportedDtypeError,
)

PREFIXES = {"visual.": ""}
NF4 = "quant_state.bitsandbytes__nf4"
TABLE = [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
Tensors = dict[str, torch.Tensor]
single = np.float32


def numbers(seed: int, count: int, low: int, high: int) -> list[int]:
    return np.random.default_rng(seed).integers(low, high, count).tolist()


def as_bytes(description: object) -> torch.Tensor:
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def describe(shape: Sequence[int], block: int = 64, **more: Any) -> dict[str, Any]:
    return {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": list(shape), **more}


def four_bit(
    shape: tuple[int, ...], block: int = 64, name: str = "visual.x.weight"
) -> tuple[Tensors, list[np.float32]]:
    """Makes a 4-bit weight and its values in order."""
    count = int(np.prod(shape))
    codes = numbers(1, count, 0, 16)
    maxima = [single(0.37) * single(1 + index) for index in range(-(-count // block))]
    padded = [*codes, 0] if count % 2 else codes
    packed = [16 * high + low for high, low in zip(padded[::2], padded[1::2], strict=True)]
    tensors = {
        name: torch.tensor(packed, dtype=torch.uint8).unsqueeze(1),
        f"{name}.absmax": torch.tensor(np.array(maxima)),
        f"{name}.quant_map": torch.tensor(TABLE),
        f"{name}.{NF4}": as_bytes(describe(shape, block)),
    }
    return tensors, [single(TABLE[code]) * maxima[index // block] for index, code in enumerate(codes)]


def nested_four_bit(shape: tuple[int, ...]) -> tuple[Tensors, list[np.float32]]:
    """Makes the same with 8-bit block maxima, in blocks of 32."""
    tensors, _ = four_bit(shape, 32)
    count = int(np.prod(shape))
    blocks = -(-count // 32)
    codes, table = numbers(2, blocks, 0, 256), [single(index) / single(255) - single(0.5) for index in range(256)]
    outer = [single(0.1) * single(1 + index) for index in range(-(-blocks // 32))]
    offset = 2.614628553390503
    maxima = [table[code] * outer[index // 32] + single(offset) for index, code in enumerate(codes)]
    tensors |= {
        "visual.x.weight.absmax": torch.tensor(codes, dtype=torch.uint8),
        "visual.x.weight.nested_absmax": torch.tensor(np.array(outer)),
        "visual.x.weight.nested_quant_map": torch.tensor(np.array(table)),
        f"visual.x.weight.{NF4}": as_bytes(
            describe(shape, 32, nested_blocksize=32, nested_dtype="float32", nested_offset=offset)
        ),
    }
    return tensors, [single(TABLE[code]) * maxima[i // 32] for i, code in enumerate(numbers(1, count, 0, 16))]


def float8(shape: tuple[int, ...]) -> torch.Tensor:
    """Makes values that FP8 represents exactly, with zeros and both extremes."""
    count = int(np.prod(shape))
    choice = [0.0, -0.0, 448.0, -448.0, 2.0**-9, 0.4375, -3.5, 26.0]
    return torch.tensor([choice[code] for code in numbers(3, count, 0, 8)]).view(shape).to(torch.float8_e4m3fn)


def write(folder: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path, tensors: Tensors, dtype: torch.dtype = torch.float32) -> Tensors:
    with Checkpoint.open(write(folder, tensors), prefixes=PREFIXES) as checkpoint:
        return dict(checkpoint.iterate(dtype))


@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(6, 50), (7, 5), (4, 3, 2, 2), (1, 1), (64,)], ids=str)
def test_four_bits(tmp_path: Path, shape: tuple[int, ...], block: int) -> None:
    tensors, expected = four_bit(shape, block)
    loaded = load(tmp_path, tensors)
    assert list(loaded) == ["x.weight"]
    assert loaded["x.weight"].shape == shape
    assert loaded["x.weight"].flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(40, 50), (7, 5), (33, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_with_nested_maxima(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, expected = nested_four_bit(shape)
    tensors["visual.x.weight"] = tensors["visual.x.weight"].flatten()  # one dimension instead of one column
    loaded = load(tmp_path, tensors, dtype)["x.weight"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded.flatten(), torch.tensor(np.array(expected)).to(dtype)), "rounded once"


def test_int8(tmp_path: Path) -> None:
    codes, maxima = numbers(4, 35, -128, 128), [single(0.3) * single(1 + row) for row in range(7)]
    tensors = {
        "visual.x.weight": torch.tensor(codes, dtype=torch.int8).view(7, 5),
        "visual.x.SCB": torch.tensor(np.array(maxima)),
    }
    expected = [single(code) * maxima[index // 5] * single(1 / 127) for index, code in enumerate(codes)]
    assert load(tmp_path, tensors)["x.weight"].flatten().tolist() == expected


SCALES: dict[str, tuple[tuple[int, ...], torch.Tensor, list[str]]] = {
    # weight's shape, scales, roles
    "scalar": ((130, 7), torch.tensor(0.37), ["weight_scale", "weight_scale_inv"]),
    "one number": ((5, 3, 2, 2), torch.tensor([0.37]), ["weight_scale", "weight_scale_inv"]),
    "vector": ((6,), torch.tensor(0.37).bfloat16(), ["weight_scale", "weight_scale_inv"]),
    "rows": ((130, 7), torch.arange(1, 131).view(130, 1) * 0.01, ["weight_scale"]),
    "rows of a convolution": ((5, 3, 2, 2), torch.arange(1, 6).view(5, 1, 1, 1) * 0.01, ["weight_scale"]),
    "blocks": ((256, 384), torch.arange(1, 7).view(2, 3) * 0.013, ["weight_scale", "weight_scale_inv"]),
    "partial blocks": ((300, 130), torch.arange(1, 7).view(3, 2) * 0.013, ["weight_scale", "weight_scale_inv"]),
    "one partial block": ((3, 5), torch.tensor([[0.013]]), ["weight_scale", "weight_scale_inv"]),
}


@pytest.mark.parametrize(("shape", "scale", "roles"), SCALES.values(), ids=SCALES)
def test_float8(tmp_path: Path, shape: tuple[int, ...], scale: torch.Tensor, roles: list[str]) -> None:
    weight = float8(shape)
    plain, scales = weight.float().numpy(), scale.float().numpy()
    expected = np.empty(shape, np.float32)
    for place in np.ndindex(*shape):
        if scale.numel() == 1:
            factor = scales.item()
        elif scale.shape[1:].numel() == 1:
            factor = scales[place[0]].item()
        else:
            factor = scales[place[0] // 128, place[1] // 128]
        expected[place] = plain[place] * single(factor)
    for role in roles:
        loaded = load(tmp_path, {"visual.x.weight": weight, f"visual.x.{role}": scale})["x.weight"]
        assert loaded.numpy().tolist() == expected.tolist()


def test_scales_may_be_in_another_shard(tmp_path: Path) -> None:
    tensors, expected = four_bit((6, 50))
    shards: dict[str, Tensors] = {"a.safetensors": {}, "b.safetensors": {}, "c.safetensors": {}}
    for (name, tensor), shard in zip(tensors.items(), ["b", "a", "c", "a"], strict=True):
        shards[f"{shard}.safetensors"][name] = tensor
    for file, content in shards.items():
        save_file(content, tmp_path / file)
    weight_map = {name: file for file, content in shards.items() for name in content}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
        checkpoint.expect({"x.weight": (6, 50)})
        ((_, tensor),) = checkpoint.iterate(torch.float32)
        assert checkpoint.weights["x.weight"].main.file == "b.safetensors"
    assert tensor.flatten().tolist() == expected


def mixed() -> Tensors:
    tensors, _ = four_bit((6, 50))
    return {
        "visual.norm.weight": torch.ones(4, dtype=torch.float16),
        **tensors,
        "visual.x.bias": torch.ones(6, dtype=torch.float16),
        "visual.y.weight": float8((130, 7)),
        "visual.y.weight_scale_inv": torch.ones(2, 1),
        "visual.y.input_scale": torch.ones(1),
    }


MIXED_SHAPES = {"norm.weight": (4,), "x.weight": (6, 50), "x.bias": (6,), "y.weight": (130, 7)}


def test_weight_and_its_companions_are_one_tensor(tmp_path: Path) -> None:
    tensors = mixed()
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    steps: list[tuple[int, int]] = []
    with Checkpoint.open(write(tmp_path, tensors), prefixes=PREFIXES) as checkpoint:
        checkpoint.expect(MIXED_SHAPES)
        schemes = [checkpoint.weights[name].scheme for name in MIXED_SHAPES]
        assert schemes == [None, "bitsandbytes NF4", None, "block FP8"]
        with pytest.raises(ShapeMismatchError, match=r"visual\.x\.weight.*got \[6, 50\]"):
            checkpoint.expect({**MIXED_SHAPES, "x.weight": (150, 1)})
        list(checkpoint.iterate(torch.float32, progress=lambda done, total: steps.append((done, total))))
        total = sum(sizes.values()) - sizes["visual.y.input_scale"]
        assert [step[1] for step in steps] == [total] * 4
        assert steps[-1] == (total, total)
        parts = sum(size for name, size in sizes.items() if name.startswith("visual.x.weight"))
        assert checkpoint.weights["x.weight"].nbytes == parts
        assert parts in {after - before for (before, _), (after, _) in zip([(0, 0), *steps], steps, strict=False)}


def test_plain_tower_of_a_quantized_language_model(tmp_path: Path) -> None:
    tensors = {
        "visual.x.weight": torch.ones(2, 2, dtype=torch.float16),
        "model.layers.0.q_proj.qweight": torch.ones(2, 2, dtype=torch.int32),
        "model.layers.0.q_proj.scales": torch.ones(2, dtype=torch.float16),
    }
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    loaded = load(tmp_path, tensors, torch.bfloat16)
    assert list(loaded) == ["x.weight"]
    assert loaded["x.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["attn.k_proj.input_scale", "attn.k_proj.k_scale", "attn.k_scale", "attn.v_scale"])
def test_activation_scales_need_a_quantized_weight(tmp_path: Path, name: str) -> None:
    scales = {"visual.attn.k_proj.weight_scale": torch.ones(1), f"visual.{name}": torch.ones(1)}
    write(tmp_path, {"visual.attn.k_proj.weight": float8((4, 4)), **scales})
    Checkpoint.open(tmp_path, prefixes=PREFIXES).expect({"attn.k_proj.weight": (4, 4)})
    write(tmp_path, {"visual.attn.k_proj.weight": torch.ones(4, 4), f"visual.{name}": torch.ones(1)})
    with pytest.raises(UnexpectedTensorError, match=re.escape(name)):
        Checkpoint.open(tmp_path, prefixes=PREFIXES).expect({"attn.k_proj.weight": (4, 4)})


@pytest.mark.parametrize("extra", ["x.weight_scale", "x.SCB", "x.weight_shape", "attn.input_scale", "attn.q.SCB"])
def test_companions_without_a_weight_are_unexpected(tmp_path: Path, extra: str) -> None:
    specs = {"x.weight": (4, 4), "attn.q.weight": (4, 4)}
    quantized = {"visual.attn.q.weight": float8((4, 4)), "visual.attn.q.weight_scale": torch.ones(())}
    write(tmp_path, {"visual.x.weight": torch.ones(4, 4), **quantized, f"visual.{extra}": torch.ones(1)})
    with pytest.raises(UnexpectedTensorError, match=re.escape(f"visual.{extra}")):
        Checkpoint.open(tmp_path, prefixes=PREFIXES).expect(specs)


def test_dtype_of_plain_recorded_or_unknown_tensors(tmp_path: Path) -> None:
    def parse_dtype(tensors: Tensors) -> torch.dtype:
        return Checkpoint.open(write(tmp_path, tensors), prefixes=PREFIXES).dtype

    packed, _ = four_bit((60, 50))
    scaled = {"visual.y.weight": float8((130, 7)), "visual.y.weight_scale": torch.ones(1)}
    assert parse_dtype({**packed, **scaled, "visual.norm": torch.ones(2)}) == torch.float32
    small = {"visual.small": torch.ones(4), "visual.large": torch.ones(64, dtype=torch.bfloat16)}
    assert parse_dtype(small) == torch.bfloat16
    assert parse_dtype({**scaled, **packed}) == torch.float16
    assert parse_dtype(scaled) == torch.bfloat16


i32, u8, i8 = (partial(torch.ones, dtype=dtype) for dtype in (torch.int32, torch.uint8, torch.int8))
ONE, ROWS, FP8 = torch.ones(1), torch.ones(8, 1), float8((8, 8))
UNSUPPORTED: list[tuple[Tensors, str]] = [
    # tensors of one module, the weight first, and its scheme
    ({"qweight": i32(8, 1), "qzeros": i32(1, 1), "scales": torch.ones(1, 8)}, "AWQ/GPTQ int4"),
    ({"qweight": i32(1, 8), "scales": torch.ones(1, 8), "g_idx": i32(8)}, "AWQ/GPTQ int4"),
    ({"weight_packed": i32(8, 1), "weight_scale": ROWS, "weight_shape": i32(2)}, "compressed-tensors pack-quantized"),
    ({"weight_packed": u8(8, 8), "weight_scale": float8((8, 1)), "weight_global_scale": ONE}, "NVFP4"),
    ({"weight": u8(8, 8), "weight_scale": float8((8, 1)), "weight_scale_2": ONE, "input_scale": ONE}, "NVFP4"),
    ({"weight_packed": u8(8, 16), "weight_scale": u8(8, 1)}, "MXFP4"),
    ({"weight": u8(8, 16), "weight_scale": u8(8, 1)}, "MXFP4"),
    ({"weight": i8(8, 8), "weight_scale": ROWS}, "compressed-tensors int-quantized"),
    ({"weight": FP8, "weight_scale": ONE, "weight_zero_point": float8((1,))}, "FP8 with a zero point"),
    ({"weight": FP8, "weight_scale": ONE, "weight_scale_inv": ONE}, "FP8 with both"),
    ({"weight": FP8, "weight_scale": ONE, "weight_scale_2": ONE}, "FP8 with two levels"),
    ({"weight": FP8, "qscale_weight": ONE, "qscale_act": ONE}, "Mistral's own FP8"),
    ({"weight": u8(32, 1), "weight.absmax": ONE, "weight.quant_map": torch.ones(16)}, "bitsandbytes 4-bit without"),
]


@pytest.mark.parametrize(("parts", "scheme"), UNSUPPORTED, ids=lambda value: value if isinstance(value, str) else "")
def test_other_schemes_are_rejected_unless_unneeded(tmp_path: Path, parts: Tensors, scheme: str) -> None:
    module = {f"visual.fc.{name}": part for name, part in parts.items()}
    write(tmp_path, {"visual.norm.weight": torch.ones(4), **module})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "some-method"}}')
    message = rf"'visual\.fc\.{next(iter(parts))}' in .* is stored as \w+, {scheme}.*'some-method'.* can be"
    with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
        assert set(checkpoint.weights) == {"norm.weight", "fc.weight"}
        for needed in ({"norm.weight": (4,)}, {"norm.weight": (4,), "fc.weight": (8, 8)}):
            with pytest.raises(UnsupportedDtypeError, match=message):
                checkpoint.expect(needed)
        with pytest.raises(UnsupportedDtypeError, match=message):
            list(checkpoint.iterate(torch.float32))
        assert checkpoint.dtype == torch.float32
        checkpoint.expect({"norm.weight": (4,)}, unneeded=["fc.weight"])
        assert [name for name, _ in checkpoint.iterate(torch.float32)] == ["norm.weight"]


def test_weight_with_two_schemes_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"visual.fc.weight": torch.ones(8, 8), "visual.fc.qweight": i32(8, 1)})
    checkpoint = Checkpoint.open(tmp_path, prefixes=PREFIXES)
    assert set(checkpoint.weights) == {"fc.weight", "fc.qweight"}
    with pytest.raises(UnsupportedDtypeError, match=r"visual\.fc\.qweight"):
        checkpoint.expect({"fc.weight": (8, 8)})


VARIANTS: dict[str, tuple[Tensors, str]] = {
    "scales of exponents": ({"weight": float8((8, 8)), "weight_scale": u8(8, 1)}, "'visual.fc.weight_scale'"),
    "no scale": ({"weight": float8((8, 8))}, "stored as F8_E4M3;"),
    "scale per column": ({"weight": float8((8, 6)), "weight_scale": torch.ones(1, 6)}, "shape [1, 6]"),
    "flat scale per row": ({"weight": float8((8, 6)), "weight_scale": torch.ones(8)}, "shape [8]"),
    "scale per group": ({"weight": float8((8, 64)), "weight_scale": torch.ones(8, 2)}, "weight of shape [8, 64]"),
    "inverse scale per row": ({"weight": float8((8, 6)), "weight_scale_inv": torch.ones(8, 1)}, "128 x 128"),
    "other blocks": ({"weight": float8((128, 128)), "weight_scale_inv": torch.ones(2, 2)}, "128 x 128"),
    "blocks of a convolution": ({"weight": float8((8, 3, 2, 2)), "weight_scale_inv": torch.ones(1, 1)}, "128 x 128"),
    "another order of rows": ({"weight": i8(4, 4), "SCB": torch.ones(4), "weight_format": u8(())}, "row by row"),
}


@pytest.mark.parametrize(("parts", "text"), VARIANTS.values(), ids=VARIANTS)
def test_unknown_variants_are_rejected(tmp_path: Path, parts: Tensors, text: str) -> None:
    write(tmp_path, {f"visual.fc.{name}": part for name, part in parts.items()})
    checkpoint = Checkpoint.open(tmp_path, prefixes=PREFIXES)
    with pytest.raises(UnsupportedDtypeError, match=re.escape(text)):
        checkpoint.expect({"fc.weight": tuple(parts["weight"].shape)})
    with pytest.raises(UnsupportedDtypeError, match=re.escape(text)):
        list(checkpoint.iterate(torch.float32))


DESCRIPTIONS: dict[str, tuple[object, str | tuple[str, str]]] = {
    "not JSON": (b"{", "not JSON"),
    "too long": (b" " * 70_000, "at most 65536 bytes"),
    "no shape": ({"quant_type": "nf4", "blocksize": 64, "dtype": "float16"}, ("shape must be", "got None")),
    "shape a text": (describe([]) | {"shape": "6, 50"}, "a list"),
    "shape negative": (describe([-6, -50]), ("shape[0] must be", "got -6")),
    "shape astronomic": (describe([2**40, 2**40]), "604462909807314587353088 bytes"),
    "shape beyond": (describe([2**41]), ("shape[0] must be", "got 2199023255552")),
    "shape with many digits": (b'{"shape": [' + b"9" * 5000 + b"]}", "too many digits"),
    "shape too large": (describe([6, 51]), "153 bytes in one column"),
    "block zero": (describe([6, 50], 0), ("blocksize must be", "got 0")),
    "block that does not fit the maxima": (describe([6, 50], 128), "F32 of shape [3]"),
    "other kind": (describe([6, 50]) | {"quant_type": "fp4"}, ("quant_type must be", "got 'fp4'")),
    "unknown type": (describe([6, 50]) | {"dtype": "int4"}, ("dtype must be", "got 'int4'")),
    "key twice": (b'{"dtype": "float16", "dtype": "float32"}', "given twice"),
}


@pytest.mark.parametrize(("description", "text"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_invalid_description_of_4_bits(tmp_path: Path, description: object, text: str | tuple[str, str]) -> None:
    tensors, _ = four_bit((6, 50))
    tensors[f"visual.x.weight.{NF4}"] = as_bytes(description)
    checkpoint = Checkpoint.open(write(tmp_path, tensors), prefixes=PREFIXES)
    pattern = ".*".join(map(re.escape, (text,) if isinstance(text, str) else text))
    with pytest.raises(CheckpointCorruptError, match=pattern) as caught:
        checkpoint.expect({"x.weight": (6, 50)})
    assert "visual.x.weight" in str(caught.value)
    assert str(caught.value).isprintable()


def nested_state(**change: object) -> torch.Tensor:
    nested = {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 2.0, **change}
    return as_bytes(describe([40, 50], 32, **nested))


PARTS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    # part, its replacement, the message
    "codes in two columns": ("", u8(500, 2), "1000 bytes in one column"),
    "codes in an odd type": ("", torch.ones(125, 1, dtype=torch.int64), "1000 bytes in one column"),
    "no maxima": (".absmax", None, "its absmax is missing"),
    "maxima not in 8 bits": (".absmax", torch.ones(63), "U8 of shape [63]"),
    "maxima too few": (".absmax", u8(62), "U8 of shape [63]"),
    "no table": (".quant_map", None, "its quant_map is missing"),
    "table too short": (".quant_map", torch.ones(15), "F32 of shape [16]"),
    "table of another type": (".quant_map", torch.ones(16).double(), "F32 of shape [16]"),
    "no outer maxima": (".nested_absmax", None, "its nested_absmax is missing"),
    "outer maxima too many": (".nested_absmax", torch.ones(3), "F32 of shape [2]"),
    "no outer table": (".nested_quant_map", None, "its nested_quant_map is missing"),
    "outer table too short": (".nested_quant_map", torch.ones(255), "F32 of shape [256]"),
    "outer block": (f".{NF4}", nested_state(nested_blocksize=0), "nested_blocksize must be"),
    "outer offset": (f".{NF4}", nested_state(nested_offset="2.0"), "nested_offset must be"),
    "outer type": (f".{NF4}", nested_state(nested_dtype="bfloat16"), "nested_dtype must be"),
    "outer block of another size": (f".{NF4}", nested_state(nested_blocksize=4096), "F32 of shape [1]"),
    "description in a square": (f".{NF4}", u8(4, 4), "U8, at most"),
    "description of another type": (f".{NF4}", torch.ones(4), "U8, at most"),
}


@pytest.mark.parametrize(("part", "value", "text"), PARTS.values(), ids=PARTS)
def test_contradicting_parts_are_rejected(tmp_path: Path, part: str, value: torch.Tensor | None, text: str) -> None:
    tensors, _ = nested_four_bit((40, 50))
    name = f"visual.x.weight{part}"
    tensors = {other: tensor for other, tensor in tensors.items() if other != name}
    if value is not None:
        tensors[name] = value
    checkpoint = Checkpoint.open(write(tmp_path, tensors), prefixes=PREFIXES)
    with pytest.raises(CheckpointCorruptError, match=re.escape(text)):
        checkpoint.expect({"x.weight": (40, 50)})


@pytest.mark.parametrize(
    "parts",
    [
        {"weight": i8(4, 4), "SCB": torch.ones(5)},
        {"weight": i8(4, 4), "SCB": torch.ones(4).half()},
        {"weight": i8(4), "SCB": torch.ones(4)},
        {"weight": i8(4, 4), "SCB": torch.ones(4), "weight_format": u8(2)},
        {"weight": i8(4, 4), "SCB": torch.ones(4), "weight_format": torch.zeros(())},
    ],
)
def test_contradicting_int8_parts_are_rejected(tmp_path: Path, parts: Tensors) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"visual\.x\.(SCB|weight_format)"):
        load(tmp_path, {f"visual.x.{name}": part for name, part in parts.items()})


def test_non_finite_results_are_rejected(tmp_path: Path) -> None:
    weight = float8((4, 4))
    tensors = {"visual.x.weight": weight, "visual.x.weight_scale": torch.tensor(1e3)}
    assert load(tmp_path, tensors)["x.weight"].abs().max() == 448_000
    with pytest.raises(NonFiniteWeightsError, match=r"values up to 448000, but the maximum of torch\.float16 is 65504"):
        load(tmp_path, tensors, torch.float16)
    weight.view(torch.uint8)[1, 2] = 0x7F  # FP8's only NaN
    with pytest.raises(NonFiniteWeightsError, match="has NaN or infinity") as caught:
        load(tmp_path, tensors)
    assert caught.value.name == "visual.x.weight"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_mutated_file_raises_only_tower_errors(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(save({**mixed(), **nested_four_bit((40, 50))[0]}))
    description = content.index(b'{"quant_type"')
    for _ in range(data.draw(st.integers(1, 3))):
        last = len(content) - 1
        position = data.draw(st.integers(0, last) | st.integers(description, min(description + 170, last)))
        byte = data.draw(
            st.binary(max_size=3) | st.sampled_from(list(b'0123456789[]{},:"-.eE')).map(lambda b: bytes([b]))
        )
        content[position : position + data.draw(st.integers(0, 3) | st.just(len(byte)))] = byte
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
            checkpoint.expect({**MIXED_SHAPES, "x.weight": (40, 50)})
            loaded = dict(checkpoint.iterate(torch.float32))
    except TowerError as error:
        message = str(error)
    else:
        message = ""
        assert loaded["x.weight"].shape == (40, 50)
    assert message.isprintable() or not message
