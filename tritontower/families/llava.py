"""LLaVA 1.5 and its relatives (Liu et al. 2023, arXiv 2310.03744): a CLIP or SigLIP encoder and two linears.

The features are hidden states in front of the end of the encoder, by default those in front of its last block, which is
then neither built nor read; the class token is left out.  The reference is ``LlavaModel`` of
``transformers.models.llava.modeling_llava``.  A LLaVA with a Pixtral tower is another family.
"""

from tritontower.preprocessing import FixedSize
from tritontower.reader import ConfigReader

from . import Family, FamilySummary
from ._llava import CLIP_LARGE_336, ClassDefaults, LlavaReference, claimed, llava_tensors, read_llava
from ._vit import IGNORED, ROOTS_IN_MODEL

MODEL_TYPES = claimed("llava")

DEFAULTS = ClassDefaults(tower="clip_vision_model", vision=CLIP_LARGE_336, text="llama", layer=-2, strategy="default")

SUMMARIES = (
    FamilySummary(
        title="LLaVA",
        checkpoints="LLaVA-1.5 7B, 13B, and models of that form with a CLIP or SigLIP encoder",
        pictures="one size (336 pixels): the shorter side is scaled to it, the middle is cropped",
        video=False,
        tokens="(size / patch)²",
        example={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
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
            "vocab_size": 32064,
        },
        processor={
            "crop_size": {"height": 336, "width": 336},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 336},
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads encoder, features and projector; what a sparse file leaves out has the defaults of ``LlavaConfig``."""
    config = read_llava(reader, "llava", DEFAULTS)
    return Family(
        config=config,
        roots=ROOTS_IN_MODEL,
        tensors=llava_tensors(config),
        ignored=IGNORED,
        preprocessors={"hf": FixedSize},
        reference=LlavaReference(),
    )
