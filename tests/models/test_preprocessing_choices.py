"""Preparation of images by a model's options: Gemma 3's pan-and-scan, and Mistral's own resizing for Pixtral."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checkpoints import noise
from support.towers import all_cases
from support.towers.gemma import PAN_AND_SCAN

from tritontower import VisionTower
from tritontower.errors import UsageError
from tritontower.parity.parity import relative_error

Load = Callable[..., VisionTower]


@pytest.fixture
def load(saved: Any) -> Load:
    """Loads the small checkpoint of a case."""

    def make(name: str, **options: Any) -> VisionTower:
        (case,) = (case for case in all_cases() if case.name == name)
        return VisionTower.from_pretrained(saved(case), device="cpu", **options)

    return make


def test_pan_and_scan_as_an_option_and_in_the_file_are_equal(load: Load) -> None:
    sizes = {(300, 64): 3, (64, 300): 3, (157, 243): 2, (90, 90): 0}
    images = [noise(*size, seed=3) for size in sizes]
    by_option, by_file = load("gemma3", processor_options=PAN_AND_SCAN), load("gemma3-pan-and-scan")
    for ours, other, (size, crops) in zip(by_option.encode(images), by_file.encode(images), sizes.items(), strict=True):
        assert torch.equal(ours.embeddings, other.embeddings)
        assert ours.num_tokens == 16 * (1 + crops) == by_option.count_tokens(*size)
    with pytest.raises(UsageError, match="do_pan_and_scan"):
        load("paligemma", delay_load=True, processor_options={"do_pan_and_scan": True})


@pytest.mark.parametrize("name", ["pixtral", "mistral3"])
def test_mistrals_own_preprocessing_differs(name: str, load: Load) -> None:
    image = noise(301, 200, 1)
    theirs, own = load(name), load(name, preprocessing="mistral")
    assert own.preprocessor.layout(301, 200).grid == theirs.preprocessor.layout(301, 200).grid
    (first,), (second,) = theirs.encode(image), own.encode(image)
    assert 0.01 < relative_error(second.embeddings, first.embeddings) < 1.0
    # Small images of whole tokens are not resized.
    side = 32 if name == "pixtral" else 28
    small = [tower.preprocess(noise(side, side, 2)).pixels for tower in (theirs, own)]
    assert (small[0] - small[1]).abs().max() < 1e-5
