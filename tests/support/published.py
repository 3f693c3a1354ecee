"""Published checkpoints without their weights: ``config.json`` and processor file, and what is known of their towers.

Configurations hold what concerns the tower, as the model's repository has it.  The numbers beside them were worked out
from the towers' published descriptions, not by this project: parameters in millions, operations in 10¹² with two per
multiply–add, both to the digits that are given here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PUBLISHED", "PictureFacts", "PublishedTower", "write_published"]

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]
USUAL = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}


@dataclass(frozen=True)
class PictureFacts:
    """What a square picture becomes.

    Attributes:
        side: of the picture as it comes, pixels.
        patches: rows that the blocks work on, class tokens left out.
        tokens: rows of its embedding.
        tera: operations of the pass, 10¹², as text, so that its digits say how precise it is.  They are those of the blocks
            that have to run (23 of LLaVA's 24); of a picture in tiles, those of one tile without the projector.
        views: pictures and tiles that the tower sees.
    """

    side: int
    patches: int
    tokens: int
    tera: str
    views: int = 1


@dataclass(frozen=True)
class PublishedTower:
    """One checkpoint.

    Attributes:
        name: of the repository, without its owner.
        config: the configuration file.
        processor: the processor file; empty where there is none.
        tower_millions: parameters of all blocks that are published, needed or not, and of what stands before them; with
            the projector, where ``projector_millions`` is empty.
        projector_millions: parameters of the projector.
        pictures: what pictures become.
        file: name of the configuration file.
    """

    name: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    tower_millions: str
    projector_millions: str = ""
    pictures: Sequence[PictureFacts] = ()
    file: str = "config.json"


def write_published(folder: Path, tower: PublishedTower) -> Path:
    """The checkpoint's folder, as it is before any weights are fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / tower.file).write_text(json.dumps(tower.config))
    if tower.processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(tower.processor))
    return folder


# -- Qwen -------------------------------------------------------------------------------------------------------------


def _qwen_processor(patch: int, mean: Sequence[float], std: Sequence[float], **size: Any) -> dict[str, Any]:
    return {
        "image_mean": mean,
        "image_std": std,
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **size,
    }


QWEN2_PROCESSOR = _qwen_processor(14, CLIP_MEAN, CLIP_STD, min_pixels=3136, max_pixels=12845056)
QWEN3_PROCESSOR = _qwen_processor(
    16,
    HALF,
    HALF,
    size={"longest_edge": 16777216, "shortest_edge": 65536},
    processor_class="Qwen3VLProcessor",
) | {"image_processor_type": "Qwen2VLImageProcessorFast"}


def _qwen2_vl(size: str, output: int, millions: str, pictures: Sequence[PictureFacts] = ()) -> PublishedTower:
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": output,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": output,
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }
    return PublishedTower(f"Qwen2-VL-{size}-Instruct", config, QWEN2_PROCESSOR, millions, "", pictures)


def _qwen2_5_vl(
    size: str, output: int, mlp: int, millions: str, pictures: Sequence[PictureFacts] = ()
) -> PublishedTower:
    vision = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": mlp,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": output,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "hidden_size": output,
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }
    return PublishedTower(f"Qwen2.5-VL-{size}-Instruct", config, QWEN2_PROCESSOR, millions, "", pictures)


SMALL_QWEN3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_QWEN3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def _qwen3(
    name: str,
    model_type: str,
    vision: Mapping[str, Any],
    output: int,
    millions: str,
    pictures: Sequence[PictureFacts] = (),
) -> PublishedTower:
    config = {
        "image_token_id": 151655,
        "model_type": model_type,
        "text_config": {"dtype": "bfloat16", "hidden_size": output, "model_type": f"{model_type}_text"},
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": model_type,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": output,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
    }
    return PublishedTower(name, config, QWEN3_PROCESSOR, millions, "", pictures)


# -- Mistral ----------------------------------------------------------------------------------------------------------


def _pixtral_processor(longest_edge: int, patch: int) -> dict[str, Any]:
    return USUAL | {
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": {"height": patch, "width": patch},
        "processor_class": "PixtralProcessor",
        "resample": 3,
        "size": {"longest_edge": longest_edge},
    }


PIXTRAL = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_seq_length": 1,
    "image_token_index": 10,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "model_type": "mistral"},
    "torch_dtype": "bfloat16",
    "vision_config": {
        "head_dim": 64,
        "hidden_act": "silu",
        "image_size": 1024,
        "model_type": "pixtral",
        "patch_size": 16,
        "rope_theta": 10000.0,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
PIXTRAL_PARAMS = {
    "dim": 5120,
    "n_layers": 40,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 131072,
    "rope_theta": 1000000000.0,
    "vision_encoder": {
        "hidden_size": 1024,
        "num_channels": 3,
        "image_size": 1024,
        "patch_size": 16,
        "rope_theta": 10000.0,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_token_id": 10,
        "image_break_token_id": 12,
        "image_end_token_id": 13,
    },
}
PIXTRAL_PICTURES = (PictureFacts(448, 784, 784, "0.74"), PictureFacts(1024, 4096, 4096, "5.21"))


def _mistral3(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {"model_type": "mistral", "rms_norm_eps": 1e-05, **text},
        "torch_dtype": "bfloat16",
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "image_size": 1540,
            "initializer_range": 0.02,
            "model_type": "pixtral",
            "num_channels": 3,
            "patch_size": 14,
            "rope_theta": 10000.0,
            **vision,
        },
        "vision_feature_layer": -1,
    }


SMALL_MISTRAL = _mistral3(
    {"hidden_size": 5120, "head_dim": 128, "intermediate_size": 32768},
    {
        "head_dim": 64,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
)
LARGE_MISTRAL = _mistral3(
    {"hidden_size": 12288, "head_dim": 128, "intermediate_size": 28672},
    {
        "head_dim": 104,
        "hidden_size": 1664,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
    },
)

# -- towers with one size of picture ----------------------------------------------------------------------------------


def _siglip(depth: int, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": depth,
        "patch_size": 14,
        "vision_use_head": False,
        **changes,
    }


def _gemma3(size: str, width: int, projector: str) -> PublishedTower:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {"hidden_size": width, "model_type": "gemma3_text", "sliding_window": 1024},
        "torch_dtype": "bfloat16",
        "vision_config": _siglip(27, image_size=896),
    }
    processor = USUAL | {
        "do_convert_rgb": None,
        "do_pan_and_scan": None,
        "image_mean": HALF,
        "image_std": HALF,
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 256,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "size": {"height": 896, "width": 896},
    }
    pictures = [PictureFacts(side, 4096, 256, "5.46") for side in (448, 1024)]
    return PublishedTower(f"gemma-3-{size}-it", config, processor, "416.9", projector, pictures)


def _llava(size: str, text: Mapping[str, Any], projector: str, tera: str) -> PublishedTower:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, **text},
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    processor = USUAL | {
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "size": {"shortest_edge": 336},
    }
    pictures = [PictureFacts(side, 576, 576, tera) for side in (448, 1024)]
    return PublishedTower(f"llava-1.5-{size}-hf", config, processor, "303.5", projector, pictures)


PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
ONEVISION = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "image_grid_pinpoints": PINPOINTS,
    "image_token_index": 151646,
    "model_type": "llava_onevision",
    "projector_hidden_act": "gelu",
    "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "model_type": "qwen2"},
    "torch_dtype": "float16",
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": _siglip(26, image_size=384),
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
ONEVISION_PROCESSOR = USUAL | {
    "do_convert_rgb": True,
    "do_pad": True,
    "image_grid_pinpoints": PINPOINTS,
    "image_mean": HALF,
    "image_std": HALF,
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "processor_class": "LlavaOnevisionProcessor",
    "resample": 3,
    "size": {"height": 384, "width": 384},
}
PALIGEMMA = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "hidden_size": 2048,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_image_tokens": 256,
        "torch_dtype": "float32",
    },
    "torch_dtype": "float32",
    "vision_config": _siglip(27, num_image_tokens=256, projection_dim=2048, projector_hidden_act="gelu_fast"),
}
PALIGEMMA_PROCESSOR = USUAL | {
    "do_convert_rgb": None,
    "image_mean": HALF,
    "image_std": HALF,
    "image_processor_type": "SiglipImageProcessor",
    "image_seq_length": 256,
    "processor_class": "PaliGemmaProcessor",
    "resample": 3,
    "size": {"height": 224, "width": 224},
}

PUBLISHED = (
    _qwen2_vl("2B", 1536, "665.3"),
    _qwen2_vl("7B", 3584, "675.8", [PictureFacts(448, 1024, 256, "1.49"), PictureFacts(1024, 5476, 1369, "11.94")]),
    _qwen2_vl("72B", 8192, "699.4"),
    _qwen2_5_vl("3B", 2048, 3420, "668.7"),
    _qwen2_5_vl(
        "7B", 3584, 3420, "676.6", [PictureFacts(448, 1024, 256, "1.35"), PictureFacts(1024, 5476, 1369, "7.70")]
    ),
    _qwen2_5_vl("32B", 5120, 3456, "688.8"),
    _qwen2_5_vl("72B", 8192, 3456, "704.6"),
    _qwen3("Qwen3-VL-2B-Instruct", "qwen3_vl", SMALL_QWEN3, 2048, "407.0"),
    _qwen3(
        "Qwen3-VL-4B-Instruct",
        "qwen3_vl",
        SMALL_QWEN3,
        2560,
        "415.3",
        [PictureFacts(448, 784, 196, "0.58"), PictureFacts(1024, 4096, 1024, "4.36")],
    ),
    _qwen3(
        "Qwen3-VL-8B-Instruct",
        "qwen3_vl",
        LARGE_QWEN3,
        4096,
        "576.4",
        [PictureFacts(448, 784, 196, "0.79"), PictureFacts(1024, 4096, 1024, "5.80")],
    ),
    _qwen3("Qwen3-VL-32B-Instruct", "qwen3_vl", LARGE_QWEN3, 5120, "595.3"),
    _qwen3("Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe", LARGE_QWEN3, 2048, "538.6"),
    _qwen3("Qwen3-VL-235B-A22B-Instruct", "qwen3_vl_moe", LARGE_QWEN3, 4096, "576.4"),
    _qwen3(
        "Qwen3.5-27B",
        "qwen3_5",
        LARGE_QWEN3 | {"deepstack_visual_indexes": []},
        5120,
        "460.7",
        [PictureFacts(448, 784, 196, "0.74"), PictureFacts(1024, 4096, 1024, "5.56")],
    ),
    PublishedTower("pixtral-12b", PIXTRAL, _pixtral_processor(1024, 16), "403.5", "31.5", PIXTRAL_PICTURES),
    PublishedTower("Pixtral-12B-2409", PIXTRAL_PARAMS, {}, "403.5", "31.5", PIXTRAL_PICTURES, file="params.json"),
    PublishedTower(
        "Mistral-Small-3.1-24B-Instruct-2503",
        SMALL_MISTRAL,
        _pixtral_processor(1540, 14),
        "403.3",
        "35.7",
        [PictureFacts(448, 1024, 256, "0.95"), PictureFacts(1024, 5476, 1369, "7.46")],
    ),
    PublishedTower("Mistral-Large-class", LARGE_MISTRAL, _pixtral_processor(1540, 14), "2496", "182.5"),
    _gemma3("4b", 2560, "2.95"),
    _gemma3("12b", 3840, "4.4"),
    _gemma3("27b", 5376, "6.2"),
    _llava("7b", {}, "21.0", "0.39"),
    _llava("13b", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}, "31.5", "0.40"),
    PublishedTower(
        "llava-onevision-qwen2-7b-ov-hf",
        ONEVISION,
        ONEVISION_PROCESSOR,
        "397.7",
        "17.0",
        # Two or three tiles a side, with a newline behind every row of theirs, and the whole picture.
        [
            PictureFacts(448, 5 * 729, 729 + 54 * 55, "0.64", views=5),
            PictureFacts(1024, 10 * 729, 729 + 81 * 82, "0.64", views=10),
        ],
    ),
    PublishedTower(
        "paligemma-3b-pt-224",
        PALIGEMMA,
        PALIGEMMA_PROCESSOR,
        "412.4",
        "2.4",
        [PictureFacts(side, 256, 256, "0.22") for side in (448, 1024)],
    ),
)
