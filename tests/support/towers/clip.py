"""CLIP's image encoder, alone and as half of the contrastive model."""

from functools import partial

from support.vit import ENCODER_WRONG, ENCODERS, by_encoder, save_encoder

from . import TowerCase, in_section

save_clip = partial(save_encoder, "clip", whole=True)
save_clip_vision = partial(save_encoder, "clip")

CASES = [
    TowerCase(
        name="clip",
        save=save_clip,
        reference=by_encoder,
        prefixes=[[("vision_model.", "module.vision_model.")], [("vision_model.", "model.vision_model.")]],
        wrong=in_section({**ENCODER_WRONG, "model_type": ["siglip_vision_model"]}),
        repeats=True,
    ),
    TowerCase(
        name="clip_vision_model",
        save=save_clip_vision,
        reference=by_encoder,
        others=ENCODERS,
        prefixes=[[("", "vision_model.")], [("", "module.vision_model.")], [("", "model.")]],
        wrong=ENCODER_WRONG,
    ),
]
