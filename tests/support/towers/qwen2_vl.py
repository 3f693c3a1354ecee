"""Qwen2-VL."""

from support.checkpoints import save_qwen2_vl
from support.qwen import by_transformers

from . import TowerCase, in_section

# Unpublished: the graph must follow from the configuration, not from the model's name.
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

WRONG = in_section(
    {
        "hidden_size": [None, "1536", 0, True],
        "depth": [0, -3, 2.5],
        "num_heads": [0, 7, 32],
        "patch_size": [0, [14, 14]],
        "temporal_patch_size": [0],
        "spatial_merge_size": ["2", True],
        "model_type": ["siglip_vision_model"],
        "rope_parameters": [{"rope_type": "yarn"}, {"rope_theta": 0.0}],
        "hidden_act": ["mish"],
    }
)

CASES = [
    TowerCase(
        name="qwen2_vl",
        save=save_qwen2_vl,
        reference=by_transformers,
        others=OTHERS,
        prefixes=[[("visual.", "model.visual.")], [("visual.", "module.model.visual.")]],
        video=True,
        wrong=WRONG,
    )
]
