"""Resizing in pieces and cropping, compared with Pillow and transformers; buffers, threads and the cut into patches."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from support.checkpoints import noise
from support.preprocessing import put_together
from transformers.image_transforms import center_crop

from tritontower.batch.normalization import PixelNormalization
from tritontower.preprocessing import pillow_resize
from tritontower.preprocessing.images.buffers import HUGE_PAGE, allocate_array
from tritontower.preprocessing.patchify import cut_bytes, cut_into_patches, cut_values
from tritontower.preprocessing.pillow_resize import Bytes, crop_center, find_axis_order, resize_image
from tritontower.preprocessing.threads import Spread, run_serially, spread_over_threads


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of these tests are resized in many pieces."""
    monkeypatch.setattr(pillow_resize, "PIECE", 900)


def by_pillow(image: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    return np.asarray(Image.fromarray(image).resize(size, resample=resample))


def in_three(work: Callable[[slice], None], count: int) -> None:
    for part in range(3):
        work(slice(count * part // 3, count * (part + 1) // 3))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("resample", sorted(pillow_resize.FILTERS))
@pytest.mark.parametrize("spread", [run_serially, in_three])
def test_resizing_in_pieces_is_pillows_bit_for_bit(resample: int, spread: Spread) -> None:
    generator = np.random.default_rng(resample)
    # Around the limit where Pillow 13 changes the order of its axes, one axis alone, and sizes of all kinds.
    sizes = [((40, 90), (40 - loss, 90 - 2 * loss + more)) for loss in range(-20, 30, 7) for more in (-1, 0, 1)]
    sizes += [((70, 50), (70, 21)), ((70, 50), (33, 50)), ((1, 90), (1, 35)), ((90, 1), (35, 1)), ((60, 60), (1, 1))]
    sizes += [((old[0], old[1]), (new[0], new[1])) for old, new in generator.integers(1, 160, (60, 2, 2)).tolist()]
    for old, new in sizes:
        image = generator.integers(0, 256, (old[1], old[0], 3), np.uint8)
        assert np.array_equal(resize_image(image, new, resample, spread), by_pillow(image, new, resample)), (old, new)


def test_large_images_in_pieces() -> None:
    for old, new in [((900, 1500), (504, 700)), ((700, 900), (728, 924))]:
        image = noise(*old)
        assert np.array_equal(resize_image(image, new, 3), by_pillow(image, new, 3))
    image = noise(28, 56)
    assert resize_image(image, (28, 56), 3) is image


def test_the_axis_order_of_pillow_is_known() -> None:
    order = find_axis_order(3)
    assert order is not None
    newer = int(pillow_version.split(".")[0]) >= 13
    assert order((300, 200), (150, 190)) == (1, 0)
    assert order((300, 200), (290, 150)) == ((0, 1) if newer else (1, 0))
    assert order((300, 200), (300, 150)) == (0,)
    assert order((300, 200), (200, 200)) == (1,)


@pytest.mark.usefixtures("small_pieces")
def test_images_are_resized_whole_in_an_unknown_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def height_first(array: Bytes, size: tuple[int, int], resample: int) -> Bytes:
        return by_pillow(by_pillow(array, (array.shape[1], size[1]), resample), size, resample)

    monkeypatch.setattr(pillow_resize, "resize_by_pillow", height_first)
    find_axis_order.cache_clear()
    try:
        assert find_axis_order(3) is None
        image = noise(100, 80)
        for new in [(50, 60), (130, 140), (90, 20)]:
            assert np.array_equal(resize_image(image, new, 3, in_three), height_first(image, new, 3))
    finally:
        find_axis_order.cache_clear()


@pytest.mark.parametrize("crop", [(5, 5), (6, 9), (40, 3), (1, 1), (37, 41)])
def test_crops_are_those_of_transformers(crop: tuple[int, int]) -> None:
    for width, height in [(37, 41), (5, 5), (4, 50), (50, 4), (6, 8), (1, 1)]:
        image = noise(width, height)
        expected = center_crop(image, crop, input_data_format="channels_last")
        assert np.array_equal(crop_center(image, *crop), expected)


def test_large_arrays_begin_with_a_huge_page() -> None:
    for shape, dtype in [((HUGE_PAGE,), np.uint8), ((1024, 588), np.float32), ((5, 7, 100003), np.uint8)]:
        array = allocate_array(shape, dtype)
        array[...] = 3
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        assert array.ctypes.data % HUGE_PAGE == 0
    assert allocate_array((3, 5), np.float32).shape == (3, 5)


@pytest.mark.parametrize(("threads", "pixels", "serial"), [(2, 400, True), (1, 10**7, True), (5, 10**6, False)])
def test_only_large_images_start_threads(threads: int, pixels: int, serial: bool, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    seen = np.zeros(10)

    def work(part: slice) -> None:
        seen[part] += 1

    with spread_over_threads(pixels) as spread:
        assert (spread is run_serially) == serial
        spread(work, 10)
    assert (seen == 1).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_beside_an_image_is_raised(threads: int, restore_threads: None) -> None:
    def fail() -> None:
        raise OSError("beside")

    torch.set_num_threads(threads)
    with pytest.raises(OSError, match="beside"), spread_over_threads(10**6, fail):
        pass


@pytest.mark.parametrize(
    # The last size leaves a remainder, which is left out.
    ("patch", "merge", "size"),
    [(2, 1, (6, 10)), (3, 2, (12, 18)), (1, 4, (8, 4)), (5, 3, (15, 30)), (4, 1, (11, 14))],
)
def test_the_cut_equals_a_loop_over_blocks(patch: int, merge: int, size: tuple[int, int]) -> None:
    tiles = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    grid = (1, size[0] // patch, size[1] // patch)
    rows = torch.empty(2 * grid[1] * grid[2], 3 * patch**2, dtype=torch.uint8)
    cut_into_patches(tiles, patch, merge, rows)
    identity = PixelNormalization(1.0, (0.0,) * 3, (1.0,) * 3)
    for tile, part in zip(tiles, rows.chunk(2), strict=True):
        kept = tile[:, : grid[1] * patch, : grid[2] * patch]
        assert torch.equal(put_together(part, grid, patch, merge), kept.float())
        array, raw = tile.permute(1, 2, 0).numpy(), np.empty(tuple(part.shape), np.uint8)
        cut_bytes(array, patch, merge, raw)
        values = np.empty(raw.shape, np.float32)
        cut_values(array, patch, merge, identity, values, in_three)
        assert np.array_equal(raw, part.numpy())
        assert np.array_equal(values, part.numpy())
