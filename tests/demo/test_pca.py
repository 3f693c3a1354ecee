"""Feature images: similar patches look similar, constant features are gray, results are deterministic."""

import numpy as np
import pytest
import torch
from PIL import Image

from tritontower.demo.pca import principal_component_image, side_by_side
from tritontower.errors import UsageError


def _two_regions(rows: int = 6, columns: int = 8) -> torch.Tensor:
    """Left half one direction, right half another, with a little noise."""
    generator = torch.Generator().manual_seed(3)
    features = 0.01 * torch.randn(rows, columns, 32, generator=generator)
    features[:, : columns // 2, 0] += 1
    features[:, columns // 2 :, 1] += 1
    return features.flatten(0, 1)


class TestPrincipalComponents:
    def test_regions_differ_in_raster_order(self):
        red = principal_component_image(_two_regions(), 6, 8)[..., 0].astype(int)
        assert abs(red[:, :4].mean() - red[:, 4:].mean()) > 200
        assert red[:, :4].std() < 10
        assert red[:, 4:].std() < 10

    def test_shape_dtype_and_repeatability(self):
        first, second = (principal_component_image(_two_regions(), 6, 8) for _ in range(2))
        assert first.shape == (6, 8, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)

    def test_svd_signs_do_not_matter(self, monkeypatch):
        expected = principal_component_image(_two_regions(), 6, 8)
        svd = torch.linalg.svd

        def flipped(*arguments, **options):
            left, singular, right = svd(*arguments, **options)
            return -left, singular, -right

        monkeypatch.setattr(torch.linalg, "svd", flipped)
        np.testing.assert_array_equal(principal_component_image(_two_regions(), 6, 8), expected)

    def test_an_outlier_keeps_the_contrast(self):
        features = torch.zeros(100, 4)
        features[:, 0] = torch.linspace(0, 1, 100)
        features[-1, 0] = 100
        red = principal_component_image(features, 10, 10)[..., 0].reshape(-1)[:98]
        assert int(red.max()) - int(red.min()) > 150

    def test_constant_features_are_middle_gray(self):
        assert {*principal_component_image(torch.full((12, 7), 3.3), 3, 4).reshape(-1).tolist()} == {128}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, dtype):
        exact = principal_component_image(_two_regions(), 6, 8)[..., 0].astype(int)
        rounded = principal_component_image(_two_regions().to(dtype), 6, 8)[..., 0].astype(int)
        assert np.abs(exact - rounded).mean() < 3

    @pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 5), (1, 2, 1), (2, 1, 2)])
    def test_fewer_components_than_channels(self, rows, columns, width):
        image = principal_component_image(torch.arange(rows * columns * width).view(-1, width) ** 2.0, rows, columns)
        assert image.shape == (rows, columns, 3)
        assert (image[..., 2] == 128).all()

    @pytest.mark.parametrize("features", [torch.zeros(5, 3), torch.zeros(6), torch.zeros(6, 0), torch.zeros(1, 6, 3)])
    def test_wrong_shapes_are_refused(self, features):
        with pytest.raises(UsageError, match=r"must have shape \[6, D\] for a grid of 2 × 3"):
            principal_component_image(features, 2, 3)

    def test_non_finite_features_are_refused(self):
        with pytest.raises(UsageError, match="NaN or infinity"):
            principal_component_image(torch.tensor([[1.0, float("nan")]]), 1, 1)


class TestSideBySide:
    def test_pairs_are_stacked(self):
        images = [Image.new("RGB", (40, 20), "red"), Image.new("L", (10, 30), 255)]
        maps = [np.full((2, 4, 3), 50, np.uint8), np.full((3, 1, 3), 90, np.uint8)]
        page = np.asarray(side_by_side(images, maps, ["one", "two"], cell=60))
        for color, width, height in [((255, 0, 0), 60, 30), ((50,) * 3, 60, 30), ((90,) * 3, 20, 60)]:
            rows, columns = np.nonzero((page == color).all(axis=-1))
            assert np.ptp(columns) + 1 == width
            assert np.ptp(rows) + 1 == height
        red, gray = (np.argwhere((page == color).all(axis=-1)) for color in ((255, 0, 0), (50,) * 3))
        assert red[:, 0].min() == gray[:, 0].min()
        assert red[:, 1].max() < gray[:, 1].min()

    def test_patches_stay_sharp_squares(self):
        checks = np.array([[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]], np.uint8)
        page = np.asarray(side_by_side([Image.new("RGB", (50, 50), (9, 9, 9))], [checks], [""], cell=50))
        assert page.shape[1] == 2 * 50 + 3 * 12
        shown = page[-62:-12, -62:-12]
        assert {*shown.reshape(-1).tolist()} == {0, 255}
        assert shown[:25, :25].max() == 0
        assert shown[:25, 25:].min() == 255

    def test_long_and_foreign_titles_fit(self):
        blank = side_by_side([Image.new("RGB", (8, 8))], [np.zeros((1, 1, 3), np.uint8)], [""], cell=80)
        titled = side_by_side([Image.new("RGB", (8, 8))], [np.zeros((1, 1, 3), np.uint8)], ["3 × 4 猫 " * 30], cell=80)
        assert blank.size == titled.size
        assert np.asarray(blank)[:27].tobytes() != np.asarray(titled)[:27].tobytes()
        assert (np.asarray(titled)[:27, -8:] == np.asarray(blank)[:27, -8:]).all()

    @pytest.mark.parametrize("count", [0, 2])
    def test_incomplete_pairs_are_refused(self, count):
        with pytest.raises(UsageError, match="must have one common length"):
            side_by_side(
                [Image.new("RGB", (8, 8))] * count, [np.zeros((1, 1, 3), np.uint8)] * count, ["a"] * (count // 2)
            )
