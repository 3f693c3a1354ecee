"""Preprepacked weights of the CPU path: the same bits as plain ones, in operations and in towers."""

import numpy as np
import pytest
import torch
from support.towers import all_cases

from tritontower import VisionTower
from tritontower.engine import onednn_weights
from tritontower.engine.executor import Executor
from tritontower.engine.onednn_weights import prepack_weights
from tritontower.kernels.gemm import cpu
from tritontower.kernels.gemm.torch_reference import linear_reference
from tritontower.kernels.runtime.dispatch import use

BF16 = torch.bfloat16
CASES = [case for case in all_cases() if case.name in {"qwen2_5_vl", "llava", "siglip", "mistral3", "gemma3"}]
"""Gated and plain MLPs, projectors of every form."""

needs_prepacking = pytest.mark.skipif(
    not (cpu.can_prepack(BF16) and cpu.can_prepack(torch.float32)),
    reason="oneDNN prepacks no bf16 weights on this CPU, or no fp32 ones in this torch",
)


# One and a few rows, which plain oneDNN computes by other kernels; ragged and whole blocks; a full-size MLP.
@needs_prepacking
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(1, 96, 64), (2, 130, 75), (3, 96, 64), (257, 130, 75), (64, 1280, 3420)]
)
@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu", "silu_gated"])
def test_prepacked_weights_give_the_bits_of_plain_ones(dtype, rows, columns, inner, activation):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, inner), (columns, inner), (columns,))
    )
    residual = torch.randn(rows, columns // (2 if activation == "silu_gated" else 1), generator=generator).to(dtype)
    prepacked = cpu.prepack(weight, gated=activation == "silu_gated")
    assert isinstance(prepacked, cpu.PrepackedWeight)
    assert (prepacked.shape, prepacked.dtype, prepacked.device) == (weight.shape, weight.dtype, weight.device)
    for added in (None, residual):
        plain = linear_reference(x, weight, bias, activation, added)
        assert torch.equal(linear_reference(x, prepacked, bias, activation, added), plain)


@needs_prepacking
def test_prepacked_weights_reject_other_operations():
    weight = torch.randn(64, 32)
    prepacked = cpu.prepack(weight)
    assert "64, 32" in repr(prepacked)
    with pytest.raises(TypeError, match="prepacked"):
        torch.matmul(torch.randn(3, 64), prepacked)
    with pytest.raises(ValueError, match="gated=True"):
        linear_reference(torch.randn(3, 32), prepacked, None, "silu_gated")
    with pytest.raises(ValueError, match="gated=True"):
        linear_reference(torch.randn(3, 32), cpu.prepack(weight, gated=True))


def test_weights_stay_plain_without_prepacking(monkeypatch):
    monkeypatch.setattr(cpu, "can_prepack", lambda dtype: False)
    weight = torch.randn(64, 32)
    assert cpu.prepack(weight) is weight


@needs_prepacking
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tower_with_prepacked_weights_gives_the_same_bits(case, tmp_path, monkeypatch):
    monkeypatch.setattr(onednn_weights, "INTERPRETED", False)
    with use("reference"):
        tower = VisionTower.from_pretrained(case.save(tmp_path / "model"), device="cpu")
        batch = tower.preprocess(np.full((90, 70, 3), 128, np.uint8))
        plain = tower.read_weights()
        prepacked = dict(plain)
        prepack_weights([tower.graph], prepacked)
        names = {name for name, weight in prepacked.items() if isinstance(weight, cpu.PrepackedWeight)}
        weights = tower.graph.weights
        kinds = {
            node.kind
            for node in tower.graph.nodes
            if any(weights[name].held_name in names for name in node.weights.values())
        }
        assert {"linear", "mlp"} <= kinds <= {"linear", "mlp", "projector"}
        expected = Executor(tower.graph, plain).run(batch)
        found = Executor(tower.graph, prepacked).run(batch)
        assert all(torch.equal(found[name], rows) for name, rows in expected.items())
        loaded = tower.load().run(batch)
        assert all(torch.equal(loaded[name], rows) for name, rows in expected.items())


def test_the_interpreter_keeps_plain_weights(tmp_path):
    tower = VisionTower.from_pretrained(all_cases()[0].save(tmp_path / "model"), device="cpu")
    weights = tower.read_weights()
    prepack_weights([tower.graph], weights)
    assert not any(isinstance(weight, cpu.PrepackedWeight) for weight in weights.values())
