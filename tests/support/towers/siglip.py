"""SigLIP's image encoder, alone and as half of the contrastive model."""

from functools import partial

from support.vit import ENCODER_WRONG, ENCODERS, by_encoder, save_encoder

from . import TowerCase, in_section

save_siglip = partial(save_encoder, "siglip", whole=True)
save_siglip_vision = partial(save_encoder, "siglip")

CASES = [
    TowerCase(
        name="siglip",
        save=save_siglip,
        reference=by_encoder,
        prefixes=[[("vision_model.", "module.vision_model.")], [("vision_model.", "model.vision_model.")]],
        wrong=in_section({**ENCODER_WRONG, "vision_use_head": ["no"], "model_type": ["siglip2_vision_model"]}),
        repeats=True,
    ),
    TowerCase(
        name="siglip_vision_model",
        save=save_siglip_vision,
        reference=by_encoder,
        others={**ENCODERS, "without pooling": {"vision": {"vision_use_head": False}}},
        prefixes=[[("", "vision_model.")], [("", "module.vision_model.")], [("", "model.")]],
        wrong=ENCODER_WRONG,
    ),
]
