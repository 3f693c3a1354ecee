"""Qwen2-VL."""

from support.checkpoints import save_qwen2_vl
from support.qwen import by_transformers

from . import TowerCase

# None of these is published: the graph has to come from the configuration, not from the model's name.
OTHERS = {
    "one block": {"depth": 1},
    "wide heads": {"embed_dim": 160, "num_heads": 2},
    "merge three": {"spatial_merge_size": 3},
    "merge one": {"spatial_merge_size": 1},
    "small patches": {"patch_size": 8},
    "one frame": {"temporal_patch_size": 1},
    "three frames": {"temporal_patch_size": 3},
    "gelu": {"hidden_act": "gelu", "mlp_ratio": 3},
    "silu": {"hidden_act": "silu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "one channel more": {"hidden_size": 56},
}

CASES = [
    TowerCase(
        name="qwen2_vl",
        save=save_qwen2_vl,
        reference=by_transformers,
        others=OTHERS,
        prefixes=[[("visual.", "model.visual.")], [("visual.", "module.model.visual.")]],
        video=True,
    )
]
