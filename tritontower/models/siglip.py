"""SigLIP's image encoder by itself (Zhai et al. 2023, arXiv 2303.15343), without a language model.

The tokens are the rows behind the last block and the post norm; the pooled vector is what a learned query makes of them in
an attention-pooling head, where the checkpoint has one.  The reference is ``SiglipVisionModel`` of
``transformers.models.siglip.modeling_siglip``.

``siglip`` is the whole contrastive model, of which the text half is left alone (also the fixed-size checkpoints of SigLIP 2
are of that type); ``siglip_vision_model`` is its image half, whose configuration stands at the top level and whose tensors
may or may not have the level ``vision_model.``.
"""

from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Pooling
from tritontower.preprocessing import FixedSize

from .common.clip_encoder import (
    IGNORED,
    PREFIXES_IN_CONTRASTIVE_MODEL,
    PREFIXES_OF_ENCODER,
    SIGLIP_PROCESSOR,
    SIGLIP_SO400M,
    EncoderReference,
    encoder_tensors,
    read_encoder,
)
from .common.registry import Family, FamilySummary

MODEL_TYPES = ("siglip", "siglip_vision_model")

SUMMARIES = (
    FamilySummary(
        title="SigLIP",
        checkpoints="SigLIP and fixed-size SigLIP 2: base, large, so400m (224, 256, 384, 512 pixels)",
        images="squashed to one size",
        video=False,
        tokens="(size / patch)², rounded down",
        example={
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "model_type": "siglip_text_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
            },
            "torch_dtype": "float32",
            "vision_config": {
                **SIGLIP_SO400M,
                "image_size": 384,
                "model_type": "siglip_vision_model",
            },
        },
        processor={
            **SIGLIP_PROCESSOR,
            "processor_class": "SiglipProcessor",
            "size": {"height": 384, "width": 384},
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads the image encoder; what a sparse file leaves out has the defaults of ``SiglipVisionConfig``."""
    alone = reader.get(str, "model_type") == "siglip_vision_model"
    vision = reader if alone else reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="siglip_vision_model", choices=("siglip_vision_model",))
    config = read_encoder(vision, "siglip", family="siglip")
    pools = vision.get(bool, "vision_use_head", default=True)
    config = replace(config, features_normed=True, pooling=Pooling("attention", norm=config.norm) if pools else None)
    return Family(
        config=config,
        prefixes=PREFIXES_OF_ENCODER if alone else PREFIXES_IN_CONTRASTIVE_MODEL,
        tensors=encoder_tensors(config),
        ignored=IGNORED,
        preprocessors={"hf": FixedSize},
        reference=EncoderReference("" if alone else "vision_model"),
    )
