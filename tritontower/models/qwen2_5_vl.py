"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): 3B, 7B, 32B and 72B share one kind of tower.

Patches, rotary embedding and merger are Qwen2-VL's.  New are RMS norms that round before they multiply by their weight, an MLP
gated by silu (with biases, and 3420 columns wide, which GEMM kernels handle badly), and attention within windows of
112 × 112 pixels in all blocks but a few.  The reference is ``Qwen2_5_VisionTransformerPretrainedModel``.

Published configurations are flat, later ones nest a ``text_config``.  transformers ignores their ``in_chans`` and
``spatial_patch_size``.
"""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import BOTH, Stacked, WeightMap
from tritontower.config import Normalization, TowerConfig, Windows
from tritontower.prompt.mrope import MropeRule

from .common.config_fields import positive
from .common.family import Family
from .common.prompts import qwen_prompt
from .common.qwen_encoder import QWEN2_MERGER, qwen_family, read_merger, read_patch, read_tower

MODEL_TYPES = ("qwen2_5_vl",)
PUBLISHED = ("qwen2_5_vl",)

# The reference reorders its rows by windows after `patch_embed`, so they are compared as the input of the first block.
VALUES = {"patch_rows": ("blocks.0.norm1", "input")}


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; missing keys have the defaults of ``Qwen2_5_VLVisionConfig``.

    Only ``hidden_size`` and ``out_hidden_size`` are required: both default to 3584, the output width of the 7B model and the
    tower's width of none.
    """
    config = _read_config(reader)
    per_second = positive(reader.section("vision_config", optional=True), "tokens_per_second", 4)
    return qwen_family(
        config,
        {"mlp_down": "mlp.down_proj"},
        QWEN2_MERGER,
        norm_kinds=("weight",),
        tensors=_gate_and_up_tensors(config),
        values=VALUES,
        prompt=qwen_prompt(reader),
        mrope=MropeRule(config.merge, positions_per_second=per_second),
    )


def _read_config(reader: ConfigReader) -> TowerConfig:
    vision = reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="qwen2_5_vl", choices=("qwen2_5_vl", "qwen2_5_vl_vision"))
    vision.get(str, "hidden_act", default="silu", choices=("silu",))
    width, depth = positive(vision, "hidden_size"), positive(vision, "depth", 32)
    patch = read_patch(vision, 14, bias=False)
    norm = Normalization("rms_norm", eps=1e-6, rounding="before_weight")
    projector = read_merger(vision, norm, width, "out_hidden_size")
    return read_tower(
        vision,
        width,
        depth,
        family="qwen2_5_vl",
        patch=patch,
        norm=norm,
        mlp_hidden=positive(vision, "intermediate_size", 3420),
        activation="silu",
        gated=True,
        windows=_read_windows(vision, patch.size * projector.merge, depth),
        projector=projector,
    )


def _read_windows(vision: ConfigReader, token: int, depth: int) -> Windows:
    """Reads the windows; ``window_size`` is in pixels, rounded down to whole tokens of ``token`` pixels."""
    pixels = vision.get(int, "window_size", default=112, minimum=token)
    full = vision.get_list(int, "fullatt_block_indexes", default=(7, 15, 23, 31), minimum=0)
    # A tower with fewer blocks keeps the indices of the whole one; transformers ignores those out of range.
    return Windows(side=pixels // token, full_blocks=tuple(sorted({block for block in full if block < depth})))


def _gate_and_up_tensors(config: TowerConfig) -> dict[str, WeightMap]:
    return {
        f"blocks.{block}.mlp_gate_up.{kind}": Stacked.of(
            f"blocks.{block}.mlp.gate_proj.{kind}", f"blocks.{block}.mlp.up_proj.{kind}"
        )
        for block in range(config.depth)
        for kind in BOTH
    }
