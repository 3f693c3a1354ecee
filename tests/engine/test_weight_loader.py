"""Weights are read into one allocation, padded and reordered in place, one stored tensor at a time."""

import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
from support.configs import CONFIG

from tritontower.checkpoint.weight_map import Stacked, Stored
from tritontower.config import TowerConfig
from tritontower.engine.weight_loader import read_weights, stored_shapes
from tritontower.graph.builder import build
from tritontower.graph.fusion import KERNEL_PASSES, fuse

SMALL = replace(
    CONFIG,
    width=64,
    heads=4,
    depth=2,
    features=(2,),
    gated=True,
    activation="silu",
    mlp_hidden=70,
    projector=replace(CONFIG.projector, hidden=256, output=48),
)


def map_weights(config: TowerConfig) -> dict:
    weight_maps = {name: Stored(f"stored.{name}") for name in build(config).sources}
    for name in weight_maps:
        if "mlp_gate_up" in name:
            weight_maps[name] = Stacked.of(f"gate.{name}", f"up.{name}")
        elif "qkv" in name:
            weight_maps[name] = Stacked.of(f"q.{name}", f"k.{name}", f"v.{name}")
    return weight_maps


class OneAtATime:
    """A checkpoint that records which of its tensors the reader keeps."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        self.kept: list[str] = []

    def iterate(self, dtype, device, *, names, progress) -> Iterator[tuple[str, torch.Tensor]]:
        assert set(names) == self.tensors.keys()
        for name, stored in self.tensors.items():
            tensor = stored.to(dtype).clone()
            reference = weakref.ref(tensor)
            yield name, tensor
            del tensor
            if reference() is not None:
                self.kept.append(name)


def test_weights_share_one_padded_allocation() -> None:
    graph, weight_maps = build(SMALL), map_weights(SMALL)
    checkpoint = OneAtATime(stored_shapes(graph, weight_maps))
    weights = read_weights(checkpoint, graph, weight_maps, torch.float32, torch.device("cpu"))
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == graph.held_shapes
    assert len({weight.untyped_storage().data_ptr() for weight in weights.values()}) == 1
    assert all(weight.data_ptr() % 256 == next(iter(weights.values())).data_ptr() % 256 for weight in weights.values())
    assert not any(weight.requires_grad for weight in weights.values())
    gate_up, down = weights["blocks.1.mlp_gate_up.weight"], weights["blocks.1.mlp_down.weight"]
    assert gate_up.shape == (256, 64)
    assert torch.equal(gate_up[128:198], checkpoint.tensors["up.blocks.1.mlp_gate_up.weight"])
    assert not gate_up[70:128].any()
    assert torch.equal(down[:, :70], checkpoint.tensors["stored.blocks.1.mlp_down.weight"])
    assert not down[:, 70:].any()
    assert checkpoint.kept == []


def test_weights_are_reordered_in_place() -> None:
    config = replace(SMALL, width=144, heads=2, projector=replace(SMALL.projector, hidden=576))
    plain, weight_maps = fuse(build(config)), map_weights(config)
    graph = fuse(plain, KERNEL_PASSES)
    checkpoint = OneAtATime(stored_shapes(plain, weight_maps))
    canonical = read_weights(checkpoint, plain, weight_maps, torch.float32, torch.device("cpu"))
    weights = read_weights(checkpoint, graph, weight_maps, torch.float32, torch.device("cpu"))
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == graph.held_shapes
    # Every tensor exists once, in its order or in another.
    assert len(weights) == len(canonical)
    assert checkpoint.kept == []
    qkv = canonical["blocks.0.qkv.weight"].view(3, 2, 72, 144)
    heads = weights["blocks.0.qkv.weight:heads-80-pairs"].view(3, 2, 80, 144)
    for part in (0, 1):
        assert torch.equal(heads[part, :, 0:72:2], qkv[part, :, :36])
        assert torch.equal(heads[part, :, 1:72:2], qkv[part, :, 36:])
    assert torch.equal(heads[2, :, :72], qkv[2])
    assert not heads[:, :, 72:].any()
    bias = weights["blocks.0.qkv.bias:heads-80-pairs-ones"].view(3, 2, 80)
    assert torch.equal(bias[2, :, :72], canonical["blocks.0.qkv.bias"].view(3, 2, 72)[2])
    assert bias[:, :, 72].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert not bias[:, :, 73:].any()
    gates = weights["blocks.1.mlp_gate_up.weight:interleaved"]
    assert gates.shape == (256, 144)
    assert torch.equal(gates[0::2], canonical["blocks.1.mlp_gate_up.weight"][:128])
    assert torch.equal(gates[1::2], canonical["blocks.1.mlp_gate_up.weight"][128:])
    same = canonical.keys() & weights.keys()
    assert all(torch.equal(canonical[name], weights[name]) for name in same)


def test_a_stored_tensor_may_serve_two_weights() -> None:
    graph, weight_maps = build(SMALL), map_weights(SMALL)
    weight_maps["projector.norm.weight"] = Stored("stored.blocks.0.norm1.weight")
    checkpoint = OneAtATime(stored_shapes(graph, weight_maps))
    weights = read_weights(checkpoint, graph, weight_maps, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(weights["projector.norm.weight"], weights["blocks.0.norm1.weight"])
    assert weights["projector.norm.weight"].any()
