"""Cases that the fast path leaves to transformers, and its self-check."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.preprocessing import (
    RULES,
    SQUARE,
    blank,
    canonical,
    make_rule,
    patches_of,
    write_settings,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tritontower.errors import ImageTooLargeError, Limits
from tritontower.preprocessing import FixedSize, Preprocessor

CLIP = {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}}


class Darker(CLIPImageProcessorPil):
    """A processor with arithmetic of its own."""

    def rescale(self, image: np.ndarray, scale: float, **arguments: Any) -> np.ndarray:
        return super().rescale(image, scale / 2, **arguments)


def fixed(given: Any, folder: Path) -> Preprocessor:
    return make_rule(FixedSize, SQUARE, folder, given=given)


def test_a_processor_with_methods_of_its_own_is_called(tmp_path: Path) -> None:
    image = canonical(noise(80, 70))
    patched = CLIPImageProcessorPil(**CLIP)
    patched.rescale = lambda image, scale, **_: np.zeros(image.shape, np.float32)
    usual, *others = (fixed(given, tmp_path) for given in (CLIPImageProcessorPil(**CLIP), Darker(**CLIP), patched))
    assert usual.fast_path is not None
    for preprocessor in others:
        assert preprocessor.fast_path is None
        assert not torch.equal(patches_of(preprocessor, [image])[0], patches_of(usual, [image])[0])


def test_a_changed_class_fails_the_self_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, normalize = canonical(noise(80, 70)), CLIPImageProcessorPil.normalize
    (before,) = patches_of(fixed(CLIPImageProcessorPil(**CLIP), tmp_path), [image])

    def shifted(self: Any, image: np.ndarray, *arguments: Any, **named: Any) -> np.ndarray:
        return np.nextafter(normalize(self, image, *arguments, **named), np.float32(9))

    monkeypatch.setattr(CLIPImageProcessorPil, "normalize", shifted)
    preprocessor = fixed(CLIPImageProcessorPil(**CLIP), tmp_path)
    assert preprocessor.fast_path is None
    assert torch.equal(patches_of(preprocessor, [image])[0], before.nextafter(torch.tensor(9.0)))


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("cropped beyond its sides", {"do_pad": True}, {}),
        ("edge", {"do_center_crop": True, "crop_size": 16}, {}),
        ("squashed", {}, {"do_rescale": None}),
        ("squashed", {}, {"resample": None}),
        ("squashed", {}, {"resample": 17}),
        ("squashed", {}, {"resample": True}),
        ("squashed", {}, {"image_mean": [0.5, 0.5]}),
        ("squashed", {}, {"image_mean": [0, 1, 1]}),
        ("squashed", {}, {"image_mean": None, "do_normalize": 1}),
    ],
)
def test_unknown_settings_are_left_to_transformers(
    tmp_path: Path, name: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    assert RULES[name].make(tmp_path, options, **changes).fast_path is None


def test_limits_that_reject_the_probe_only_reject_the_image(tmp_path: Path) -> None:
    case = RULES["squashed"]
    limits = Limits(max_planned_pixels=100)
    preprocessor = make_rule(case.rule, case.config, write_settings(tmp_path, case.content), limits)
    assert preprocessor.fast_path is None
    with pytest.raises(ImageTooLargeError, match="limit is 100 pixels"):
        preprocessor.preprocess_images([blank(50, 60)])
