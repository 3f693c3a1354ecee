"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): 3B, 7B, 32B and 72B share one kind of tower.

Patches, rotary embedding and merger are Qwen2-VL's.  New are RMS norms that round before they meet their weight, an MLP
gated by silu (with biases, and 3420 values wide, which no GEMM likes), and attention within windows of 112 × 112 pixels
in all blocks but a few.  The reference is ``Qwen2_5_VisionTransformerPretrainedModel`` of
``transformers.models.qwen2_5_vl.modeling_qwen2_5_vl``.

Published configurations are flat, later ones nest a ``text_config``; ``in_chans`` and ``spatial_patch_size`` in them are
read by nobody.
"""

from functools import partial

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stacked, WeightMap
from tritontower.config import Normalization, TowerConfig, Windows
from tritontower.preprocessing import SmartResize
from tritontower.prompt.mrope import MropeRule

from .common.config_fields import positive
from .common.prompts import qwen_prompt
from .common.qwen_encoder import (
    ATTENTION,
    IGNORED,
    NORMS,
    PREFIXES,
    QWEN2_MERGER,
    QWEN2_PROCESSOR,
    QwenReference,
    block_values,
    merger_tensors,
    merger_values,
    parameters,
    read_merger,
    read_patch,
    read_tower,
    stored_blocks,
)
from .common.registry import Family, FamilySummary

MODEL_TYPES = ("qwen2_5_vl",)

BLOCK_TENSORS = parameters(NORMS, ("weight",)) | parameters({**ATTENTION, "mlp_down": "mlp.down_proj"})
OTHER_TENSORS = {
    "patch_projection.weight": "patch_embed.proj.weight",
    **merger_tensors("projector", "merger", QWEN2_MERGER, norm_kinds=("weight",)),
}

# Value of the layer graph → module of the reference and side of it.
BLOCK_VALUES = block_values(down="mlp.down_proj")
# The reference puts its rows into the order of the windows behind ``patch_embed``: the projected patches are compared where
# they enter the first block.
OTHER_VALUES = {
    "patch_rows": ("blocks.0.norm1", "input"),
    "embeddings": ("merger", "output"),
    **merger_values("projector", "merger", QWEN2_MERGER),
}

SUMMARIES = (
    FamilySummary(
        title="Qwen2.5-VL",
        checkpoints="Qwen2.5-VL 3B, 7B, 32B, 72B",
        images="any size, to multiples of 28 pixels within an area",
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
        processor=QWEN2_PROCESSOR,
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; what a sparse file leaves out has the defaults of ``Qwen2_5_VLVisionConfig``.

    Only ``hidden_size`` and ``out_hidden_size`` must be there: the default of both is 3584, which fits the output of the 7B
    model alone and the width of none.
    """
    config = read_config(reader)
    per_second = positive(reader.section("vision_config", optional=True), "tokens_per_second", 4)
    return Family(
        config=config,
        prefixes=PREFIXES,
        tensors=stored_blocks(config, BLOCK_TENSORS, OTHER_TENSORS) | _gated(config),
        ignored=IGNORED,
        preprocessors={"hf": partial(SmartResize, frame_budget="per_frame")},
        reference=QwenReference(BLOCK_VALUES, OTHER_VALUES),
        prompt=qwen_prompt(reader),
        mrope=MropeRule(config.merge, positions_per_second=per_second),
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower of ``vision_config``."""
    vision = reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="qwen2_5_vl", choices=("qwen2_5_vl", "qwen2_5_vl_vision"))
    width = positive(vision, "hidden_size")
    patch = read_patch(vision, 14, bias=False)
    norm = Normalization("rms_norm", eps=1e-6, rounding="before_weight")
    projector = read_merger(vision, norm, width, "out_hidden_size")
    depth = positive(vision, "depth", 32)
    vision.get(str, "hidden_act", default="silu", choices=("silu",))
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
        windows=_windows(vision, patch.size * projector.merge, depth),
        projector=projector,
    )


def _windows(vision: ConfigReader, token: int, depth: int) -> Windows:
    """The windows, whose ``window_size`` is in pixels and rounded down to whole tokens of ``token`` pixels."""
    pixels = vision.get(int, "window_size", default=112, minimum=token)
    full = vision.get_list(int, "fullatt_block_indexes", default=(7, 15, 23, 31), minimum=0)
    # A tower cut short keeps the indices of the whole one; transformers lets them point nowhere as well.
    return Windows(side=pixels // token, full_blocks=tuple(sorted({block for block in full if block < depth})))


def _gated(config: TowerConfig) -> dict[str, WeightMap]:
    """Gate and up projection, stored one by one."""
    return {
        f"blocks.{block}.mlp_gate_up.{kind}": Stacked.of(
            f"blocks.{block}.mlp.gate_proj.{kind}", f"blocks.{block}.mlp.up_proj.{kind}"
        )
        for block in range(config.depth)
        for kind in ("weight", "bias")
    }
