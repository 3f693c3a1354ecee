"""Configurations whose fields contradict each other are rejected."""

from dataclasses import replace

import pytest
from support.configs import CLIP, CONFIG, DEEP, SIGLIP, WINDOWED

from tritontower.config import Pooling

MEAN, TOKEN = {"join": "mean"}, {"norm_over": "token"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(CLIP, windows=WINDOWED.windows, rotary=CONFIG.rotary), "combined with windows"),
        (lambda: replace(CLIP, patch=replace(CLIP.patch, bias=True)), "without bias"),
        (lambda: replace(CLIP, projector=CONFIG.projector), "joins no patches"),
        (lambda: replace(CLIP, newline=True, keep_class_token=True), "among the tokens of tiles"),
        (lambda: replace(CLIP, features=(5,)), "some of 0 … 4"),
        (lambda: replace(CLIP, features=()), "some of 0 … 4"),
        (lambda: replace(CLIP, gated=True), "got quick_gelu"),
        (lambda: replace(SIGLIP, output_norm=None), "need an output norm"),
        (lambda: replace(SIGLIP, pooling=Pooling("attention")), "needs a norm"),
        (lambda: replace(SIGLIP, windows=WINDOWED.windows), "rotary embedding"),
        (lambda: replace(DEEP, deepstack_projector=None), "given together"),
        (lambda: replace(CONFIG.projector, **MEAN), "must be 'token'"),
        (lambda: replace(CONFIG.projector, **TOKEN, hidden=None), "must be 'patch'"),
        (lambda: replace(CONFIG.projector, **TOKEN, merging_linear=True), "must be 'patch'"),
    ],
)
def test_contradicting_fields_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        change()
