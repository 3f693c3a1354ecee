"""Normalization of uint8 pixels equals its table of 256 values per channel, whichever arithmetic makes it."""

import numpy as np
import pytest

from tritontower.batch.normalization import PixelNormalization

MEANS, DEVIATIONS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# Division by 255 gives the table's values bit for bit only for the first factor.
@pytest.mark.parametrize("factor", [1 / 255, 1 / 254, 1.0])
def test_normalized_bytes_are_those_of_the_table(factor: float) -> None:
    normalization = PixelNormalization(factor, MEANS, DEVIATIONS)
    raw = np.random.default_rng(0).integers(0, 256, (300, 3 * 25), np.uint8)
    padded = np.full((300, 3 * 25 + 5), np.nan, np.float32)
    normalization.normalize(raw, padded[:, :-5])
    assert np.array_equal(padded[:, :-5], normalization.table[np.arange(3).repeat(25), raw])
    assert np.isnan(padded[:, -5:]).all()
    expected = ((np.arange(256) * factor).astype(np.float32) - np.float32(MEANS[1])) / np.float32(DEVIATIONS[1])
    assert np.array_equal(normalization.table[1], expected)
