"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): 3B, 7B, 32B and 72B share one kind of tower.

Patches, rotary embedding and merger are Qwen2-VL's.  New are RMS norms that round before they meet their weight, an MLP
gated by silu (with biases, and 3420 values wide, which no GEMM likes), and attention within windows of 112 × 112 pixels
in all blocks but a few.  The reference is ``Qwen2_5_VisionTransformerPretrainedModel`` of
``transformers.models.qwen2_5_vl.modeling_qwen2_5_vl``.

Published configurations are flat, later ones nest a ``text_config``; ``in_chans`` and ``spatial_patch_size`` in them are
read by nobody.
"""

from functools import partial

from tritontower.config import Normalisation, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig, Windows
from tritontower.preprocessing import SmartResize
from tritontower.reader import ConfigReader
from tritontower.recipes import Recipe, Stacked

from . import Family, FamilySummary
from ._qwen import ROOTS, QwenReference, stored_blocks
from ._reading import positive, rotary_theta, whole_heads

MODEL_TYPES = ("qwen2_5_vl",)

BLOCK_TENSORS = {
    "norm1.weight": "norm1.weight",
    "qkv.weight": "attn.qkv.weight",
    "qkv.bias": "attn.qkv.bias",
    "attention_output.weight": "attn.proj.weight",
    "attention_output.bias": "attn.proj.bias",
    "norm2.weight": "norm2.weight",
    "mlp_down.weight": "mlp.down_proj.weight",
    "mlp_down.bias": "mlp.down_proj.bias",
}
OTHER_TENSORS = {
    "patch_projection.weight": "patch_embed.proj.weight",
    "projector.norm.weight": "merger.ln_q.weight",
    "projector.linear_1.weight": "merger.mlp.0.weight",
    "projector.linear_1.bias": "merger.mlp.0.bias",
    "projector.linear_2.weight": "merger.mlp.2.weight",
    "projector.linear_2.bias": "merger.mlp.2.bias",
}

# Value of the layer graph → module of the reference and side of it.
BLOCK_VALUES = {
    "norm1_rows": ("norm1", "output"),
    "qkv_rows": ("attn.qkv", "output"),
    "mixed": ("attn.proj", "input"),
    "attention_output_rows": ("attn.proj", "output"),
    "attended": ("norm2", "input"),
    "norm2_rows": ("norm2", "output"),
    "mlp_hidden": ("mlp.down_proj", "input"),
    "mlp_down_rows": ("mlp.down_proj", "output"),
    "block_rows": ("", "output"),
}
# The reference puts its rows into the order of the windows behind ``patch_embed``: the projected patches are compared where
# they enter the first block.
OTHER_VALUES = {
    "patch_rows": ("blocks.0.norm1", "input"),
    "projector.normed": ("merger.ln_q", "output"),
    "projector.hidden": ("merger.mlp.2", "input"),
    "embeddings": ("merger", "output"),
}

SUMMARIES = (
    FamilySummary(
        title="Qwen2.5-VL",
        checkpoints="Qwen2.5-VL 3B, 7B, 32B, 72B",
        pictures="any size, to multiples of 28 pixels within an area",
        video=True,
        tokens="width/28 × height/28",
        example={
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_size": 3584,
            "torch_dtype": "bfloat16",
            "vision_config": {
                "depth": 32,
                "hidden_act": "silu",
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "in_chans": 3,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
        },
        processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": 12845056,
            "merge_size": 2,
            "min_pixels": 3136,
            "patch_size": 14,
            "temporal_patch_size": 2,
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; what a sparse file leaves out has the defaults of ``Qwen2_5_VLVisionConfig``.

    Only ``hidden_size`` and ``out_hidden_size`` must be there: the default of both is 3584, which fits the output of the 7B
    model alone and the width of none.
    """
    config = read_config(reader)
    return Family(
        config=config,
        roots=ROOTS,
        tensors=stored_blocks(config, BLOCK_TENSORS, OTHER_TENSORS) | _gated(config),
        ignored=("rotary_pos_emb.inv_freq",),
        preprocessors={"hf": partial(SmartResize, frame_budget="per_frame")},
        reference=QwenReference(BLOCK_VALUES, OTHER_VALUES),
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower of ``vision_config``."""
    vision = reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="qwen2_5_vl", choices=("qwen2_5_vl", "qwen2_5_vl_vision"))
    width = positive(vision, "hidden_size")
    patch = positive(vision, "patch_size", 14)
    merge = positive(vision, "spatial_merge_size", 2)
    norm = Normalisation("rms_norm", eps=1e-6, rounding="before_weight")
    depth = positive(vision, "depth", 32)
    vision.get(str, "hidden_act", default="silu", choices=("silu",))
    return TowerConfig(
        family="qwen2_5_vl",
        patch=PatchEmbedding(
            channels=positive(vision, "in_channels", 3),
            size=patch,
            temporal=positive(vision, "temporal_patch_size", 2),
            bias=False,
        ),
        width=width,
        depth=depth,
        heads=whole_heads(vision, "num_heads", width, positive(vision, "num_heads", 16), multiple=4),
        norm=norm,
        qkv_bias=True,
        attention_bias=True,
        mlp_hidden=positive(vision, "intermediate_size", 3420),
        mlp_bias=True,
        activation="silu",
        gated=True,
        rotary=RotaryEmbedding(theta=rotary_theta(vision), layout="halves"),
        segments="frame",
        windows=_windows(vision, patch * merge, depth),
        features=(depth,),
        projector=Projector(
            norm=norm,
            merge=merge,
            hidden=width * merge * merge,
            output=positive(vision, "out_hidden_size"),
            activation="gelu",
            bias=True,
        ),
    )


def _windows(vision: ConfigReader, token: int, depth: int) -> Windows:
    """The windows, whose ``window_size`` is in pixels and rounded down to whole tokens of ``token`` pixels."""
    pixels = vision.get(int, "window_size", default=112, minimum=token)
    full = vision.get_list(int, "fullatt_block_indexes", default=(7, 15, 23, 31), minimum=0)
    # A tower cut short keeps the indices of the whole one; transformers lets them point nowhere as well.
    return Windows(side=pixels // token, full_blocks=tuple(sorted({block for block in full if block < depth})))


def _gated(config: TowerConfig) -> dict[str, Recipe]:
    """Gate and up projection, stored one by one."""
    return {
        f"blocks.{block}.mlp_gate_up.{kind}": Stacked.of(
            f"blocks.{block}.mlp.gate_proj.{kind}", f"blocks.{block}.mlp.up_proj.{kind}"
        )
        for block in range(config.depth)
        for kind in ("weight", "bias")
    }
