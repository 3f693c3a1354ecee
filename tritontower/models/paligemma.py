"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726) and PaliGemma 2 (Steiner et al. 2024, arXiv 2412.03555).

A SigLIP encoder for one size of image (224, 448 or 896 pixels), its output norm, and one linear: a token per patch.  The
reference is ``PaliGemmaModel`` of ``transformers.models.paligemma.modeling_paligemma``.  Old releases of transformers divided
the projected rows by the root of their width, for the language model to multiply them again; the embeddings here are those
of the supported releases, which do neither.
"""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stored
from tritontower.config import Projector, TowerConfig
from tritontower.preprocessing import FixedSize
from tritontower.prompt.layout import PromptLayout

from .common.clip_encoder import IGNORED, PREFIXES_IN_MODEL, SIGLIP_PROCESSOR, SIGLIP_SO400M, encoder_tensors
from .common.config_fields import positive
from .common.gemma import GemmaReference, read_siglip, with_projector
from .common.prompts import token
from .common.registry import Family, FamilySummary

MODEL_TYPES = ("paligemma",)

PROJECTOR_TENSORS = {f"projector.linear.{role}": Stored(f"projector.linear.{role}") for role in ("weight", "bias")}

# Value of the layer graph → module of the reference's projector and side of it.
PROJECTOR_VALUES = {"embeddings": ("linear", "output")}

SUMMARIES = (
    FamilySummary(
        title="PaliGemma",
        checkpoints="PaliGemma 3B and PaliGemma 2 3B, 10B, 28B, for 224, 448 and 896 pixels",
        images="squashed to one size: 224 × 224, 448 × 448 or 896 × 896",
        video=False,
        tokens="side/14 × side/14: 256, 1024 or 4096",
        example={
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "bos_token_id": 2,
            "hidden_size": 2048,
            "image_token_index": 257152,
            "model_type": "paligemma",
            "projection_dim": 2048,
            "text_config": {"hidden_size": 2048, "model_type": "gemma", "num_image_tokens": 256},
            "torch_dtype": "float32",
            "vision_config": {
                **SIGLIP_SO400M,
                "model_type": "siglip_vision_model",
                "num_image_tokens": 256,
                "projection_dim": 2048,
                "projector_hidden_act": "gelu_fast",
                "vision_use_head": False,
            },
        },
        processor={
            **SIGLIP_PROCESSOR,
            "do_convert_rgb": None,
            "image_seq_length": 256,
            "size": {"height": 224, "width": 224},
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config`` and ``projection_dim``.

    What a sparse ``vision_config`` leaves out has the defaults of ``SiglipVisionConfig``: 224 pixels, for one.
    """
    config = read_config(reader)
    return Family(
        config=config,
        prefixes=PREFIXES_IN_MODEL,
        tensors={**encoder_tensors(config), **PROJECTOR_TENSORS},
        ignored=IGNORED,
        preprocessors={"hf": FixedSize},
        reference=GemmaReference(PROJECTOR_VALUES),
        prompt=read_prompt(reader),
    )


def read_prompt(reader: ConfigReader) -> PromptLayout:
    """Images first, then the beginning of the text, which ends in a line break (section 3.2 of the paper)."""
    return PromptLayout(
        placeholder=token(reader, "image", 256_000),
        after_images=(reader.get(int, "bos_token_id", default=2, minimum=0),),
        ending="\n",
        special_tokens=False,
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower."""
    projector = Projector(
        norm=None,
        merge=1,
        hidden=None,
        # The twin inside `vision_config` is overwritten with this one by the reference.
        output=positive(reader, "projection_dim", 2048),
        activation="gelu",
        bias=True,
    )
    return with_projector(read_siglip(reader, family="paligemma"), projector)
