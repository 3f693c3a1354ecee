"""Weights quantized by bitsandbytes, compared bit for bit with its own dequantization."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tritontower.checkpoint.checkpoint import Checkpoint

functional = pytest.importorskip("bitsandbytes.functional")

PREFIXES = {"visual.": ""}
SHAPES = [(96, 80), (80, 1176), (7, 5), (3, 3, 2, 14, 14), (160,)]
"""Blocks end in the middle of rows, the last one is not full, and the second has more blocks than one nested block."""


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).to(dtype)


def four_bit(name: str, packed: torch.Tensor, state: Any) -> dict[str, torch.Tensor]:
    return {name: packed, **{f"{name}.{role}": part for role, part in state.as_dict(packed=True).items()}}


def dequantize(packed: torch.Tensor, state: Any) -> torch.Tensor:
    # As one row: blocks run through the whole weight, and the CPU kernel of release 0.50 is wrong for rows whose length is
    # a multiple of 16 but not of the block (its generic implementation, and its quantization, are not).
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return functional.dequantize_4bit(packed, state).view(shape)


def load(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Checkpoint, torch.Tensor]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with Checkpoint.open(folder, prefixes=PREFIXES) as checkpoint:
        ((_, tensor),) = checkpoint.iterate(dtype)
        return checkpoint, tensor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "block", "nested"), [("nf4", 64, True), ("nf4", 128, False), ("fp4", 64, False), ("fp4", 128, True)]
)
def test_four_bit_weight_has_the_bits_of_bitsandbytes(
    tmp_path: Path, kind: str, nested: bool, block: int, shape: tuple[int, ...]
) -> None:
    packed, state = functional.quantize_4bit(
        weight(shape), blocksize=block, quant_type=kind, compress_statistics=nested
    )
    checkpoint, ours = load(tmp_path, four_bit("visual.x.weight", packed, state), torch.float32)
    assert torch.equal(ours, dequantize(packed, state))
    assert ours.shape == shape
    assert checkpoint.weights["x.weight"].scheme == f"bitsandbytes {kind.upper()}"


@pytest.mark.parametrize("original", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_original_and_storage_dtypes(tmp_path: Path, original: torch.dtype, storage: torch.dtype) -> None:
    packed, state = functional.quantize_4bit(weight((96, 80), original), quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    checkpoint, ours = load(tmp_path, four_bit("visual.x.weight", packed, state), original)
    assert checkpoint.dtype == original
    assert torch.equal(ours, dequantize(packed, state))


def test_int8_weight_has_the_bits_of_bitsandbytes(tmp_path: Path) -> None:
    codes, maxima, _ = functional.int8_vectorwise_quant(weight((96, 80)).half())
    _, ours = load(tmp_path, {"visual.x.weight": codes, "visual.x.SCB": maxima}, torch.float32)
    assert torch.equal(ours.view(torch.int32), functional.int8_vectorwise_dequant(codes, maxima).view(torch.int32))


@pytest.mark.parametrize("module", ["Linear4bit", "Linear8bitLt"])
def test_modules_as_they_save_themselves(tmp_path: Path, module: str) -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    options = {"quant_type": "nf4"} if module == "Linear4bit" else {"has_fp16_weights": False}
    linear = getattr(modules, module)(80, 96, **options)
    linear.load_state_dict({"weight": weight((96, 80)), "bias": torch.zeros(96)})
    linear = linear.to("cpu")  # which is what quantizes it
    state = {f"visual.x.{name}": part.contiguous() for name, part in linear.state_dict().items()}
    assert len(state) > 2, "not quantized"
    save_file(state, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path, prefixes=PREFIXES) as checkpoint:
        checkpoint.expect({"x.weight": (96, 80), "x.bias": (96,)})
        tensors = dict(checkpoint.iterate(torch.float32))
    error = (tensors["x.weight"] - weight((96, 80))).abs().max()
    assert 0 < error < (0.6 if module == "Linear4bit" else 0.03)
