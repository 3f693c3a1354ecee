"""CLIP's image encoder by itself (Radford et al. 2021, arXiv 2103.00020), without a language model.

The tokens are the rows behind the last block, that of the class token first; the pooled vector is the class token's behind
the post norm, in front of ``visual_projection``, which belongs to the contrastive model.  The reference is
``CLIPVisionModel`` of ``transformers.models.clip.modeling_clip``.

``clip`` is the whole contrastive model, of which the text half is left alone; ``clip_vision_model`` is its image half,
whose configuration stands at the top level and whose tensors may or may not have the level ``vision_model.``.
"""

from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Pooling
from tritontower.preprocessing import FixedSize

from .common.clip_encoder import (
    IGNORED,
    PREFIXES_IN_CONTRASTIVE_MODEL,
    PREFIXES_OF_ENCODER,
    EncoderReference,
    encoder_tensors,
    read_encoder,
)
from .common.registry import Family, FamilySummary

MODEL_TYPES = ("clip", "clip_vision_model")

SUMMARIES = (
    FamilySummary(
        title="CLIP",
        checkpoints="CLIP ViT-B/32, B/16, L/14, L/14-336, H/14 (OpenAI, LAION)",
        images="one size (224 or 336 pixels): the shorter side is scaled to it, the middle is cropped",
        video=False,
        tokens="(size / patch)² + 1",
        example={
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 768,
            "text_config": {"hidden_size": 768, "num_attention_heads": 12},
            "torch_dtype": "float32",
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 224,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        },
        processor={
            "crop_size": 224,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 224,
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads the image encoder; what a sparse file leaves out has the defaults of ``CLIPVisionConfig``."""
    alone = reader.get(str, "model_type") == "clip_vision_model"
    config = read_encoder(reader if alone else _section(reader), "clip", family="clip")
    config = replace(config, keep_class_token=True, pooling=Pooling("class_token"))
    return Family(
        config=config,
        prefixes=PREFIXES_OF_ENCODER if alone else PREFIXES_IN_CONTRASTIVE_MODEL,
        tensors=encoder_tensors(config),
        ignored=IGNORED,
        preprocessors={"hf": FixedSize},
        reference=EncoderReference("" if alone else "vision_model"),
    )


def _section(reader: ConfigReader) -> ConfigReader:
    """The encoder's section; old files have it twice, and then transformers lets the other one count."""
    key = "vision_config_dict" if reader.has("vision_config_dict") else "vision_config"
    vision = reader.section(key, optional=True)
    vision.get(str, "model_type", default="clip_vision_model", choices=("clip_vision_model",))
    return vision
