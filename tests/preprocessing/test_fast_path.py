"""The way past transformers' arithmetic: the same pixels, bit for bit, where it is taken; transformers' own elsewhere."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from support.checkpoints import noise
from support.preprocessing import LIMITS, canonical, make_rule, patches_of, random_sizes, tower, write_settings
from transformers.image_transforms import center_crop
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tritontower.batch.normalization import PIXEL_CENTER, PixelNormalization
from tritontower.errors import ImageTooLargeError, Limits, UsageError
from tritontower.preprocessing import (
    AnyResolution,
    FixedSize,
    LongestEdge,
    MistralResize,
    Preprocessor,
    ResizeRule,
    SmartResize,
    pillow_resize,
)
from tritontower.preprocessing.images.buffers import HUGE_PAGE, allocate_array
from tritontower.preprocessing.images.decode import decode_image
from tritontower.preprocessing.images.image import CanonicalImage
from tritontower.preprocessing.patchify import cut_bytes, cut_values
from tritontower.preprocessing.pillow_resize import Bytes, crop_center, order_axes, resize_image
from tritontower.preprocessing.threads import Spread, run_serially, spread_over_threads

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = tower(table_side=4)
SETTINGS: dict[str, tuple[type[ResizeRule], Any, dict[str, Any], dict[str, Any]]] = {
    "area": (
        SmartResize,
        tower(merge=2, temporal=2),
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 100352},
        {},
    ),
    "area, 16 × 16": (
        SmartResize,
        tower(patch=16, merge=2, temporal=2),
        {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "max_pixels": 90000, **HALF},
        {},
    ),
    "edge": (
        LongestEdge,
        tower(patch=16),
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 16, "size": {"longest_edge": 300}},
        {},
    ),
    "edge, merged": (
        LongestEdge,
        tower(merge=2),
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 14, "size": {"longest_edge": 280}},
        {},
    ),
    "cropped": (
        FixedSize,
        SQUARE,
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 60}, "crop_size": 56, "do_center_crop": True},
        {},
    ),
    "cropped beyond its sides": (
        FixedSize,
        SQUARE,
        {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 33}, "crop_size": 56, "do_center_crop": True},
        {},
    ),
    "squashed": (FixedSize, SQUARE, {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}, {}),
    "pan and scan": (
        FixedSize,
        SQUARE,
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 56, "width": 56},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 30,
            "resample": 2,
            **HALF,
        },
        {"pan_and_scan": True},
    ),
    "tiles, cropped": (
        AnyResolution,
        SQUARE,
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": 56,
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56]],
        },
        {},
    ),
    "tiles": (
        AnyResolution,
        tower(table_side=2),
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 31, "width": 31},
            "image_grid_pinpoints": [[31 * rows, 31 * columns] for rows in range(1, 5) for columns in range(1, 5)],
            **HALF,
        },
        {},
    ),
}  # fmt: skip
each_rule = pytest.mark.parametrize("name", SETTINGS)


def rule(folder: Path, name: str, options: dict[str, Any] | None = None, **changes: Any) -> Preprocessor:
    kind, config, content, arguments = SETTINGS[name]
    write_settings(folder, {**content, **changes})
    return make_rule(kind, config, folder, LIMITS, None, options, **arguments)


def by_processor(preprocessor: Preprocessor, image: CanonicalImage, **bounds: Any) -> torch.Tensor:
    """The rows of one image as transformers' processor makes them."""
    return patches_of(preprocessor.without_fast_path(), [image], **bounds)[0]


# -- the same pixels --------------------------------------------------------------------------------------------------


@each_rule
def test_pixels_are_those_of_the_processor_bit_for_bit(tmp_path: Path, name: str) -> None:
    preprocessor = rule(tmp_path, name)
    assert preprocessor.fast_path is not None
    sizes = [(1, 1), (1, 7), (9, 1), (56, 56), (31, 31), *random_sizes(50, largest=500, seed=len(name))]
    for seed, (width, height) in enumerate(sizes):
        image = canonical(noise(width, height, seed))
        (rows,) = patches_of(preprocessor, [image])
        assert torch.equal(rows, by_processor(preprocessor, image)), (width, height)


@each_rule
def test_every_arithmetic_of_the_pixels(tmp_path: Path, name: str) -> None:
    image = canonical(noise(87, 61))
    changes: list[dict[str, Any]] = [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.4, "image_std": 0.2},
        {"image_mean": [0.0, 1.0, 0.123456], "image_std": [1.0, 2.0, 3.0]},
        {"resample": 0},
        {"resample": 1},
        {"resample": Image.Resampling.HAMMING},
    ]
    for number, options in enumerate(changes):
        preprocessor = rule(tmp_path / str(number), name, options)
        assert preprocessor.fast_path is not None, options
        (rows,) = patches_of(preprocessor, [image])
        assert torch.equal(rows, by_processor(preprocessor, image)), options


def test_division_by_255_is_used_only_where_it_is_exact() -> None:
    usual = PixelNormalization(1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert usual._divides
    odd = PixelNormalization(1 / 254, usual.means, usual.deviations)
    assert not odd._divides
    raw = np.random.default_rng(0).integers(0, 256, (300, 3 * 25), np.uint8)
    for rescaling in (usual, odd):
        padded = np.full((300, 3 * 25 + 5), np.nan, np.float32)
        rescaling.normalize(raw, padded[:, :-5])
        channels = np.arange(3).repeat(25)
        assert np.array_equal(padded[:, :-5], rescaling.table[channels, raw])
        assert np.isnan(padded[:, -5:]).all()


@pytest.mark.parametrize("crop", [(5, 5), (6, 9), (40, 3), (1, 1), (37, 41)])
def test_crops_are_those_of_transformers(crop: tuple[int, int]) -> None:
    for width, height in [(37, 41), (5, 5), (4, 50), (50, 4), (6, 8), (1, 1)]:
        image = noise(width, height)
        expected = center_crop(image, crop, input_data_format="channels_last")
        assert np.array_equal(crop_center(image, *crop), expected)


def test_a_lone_large_image_is_spread_over_threads(tmp_path: Path, restore_threads: None) -> None:
    sizes = [(900, 400), (401, 801)]
    for name in ("area", "edge", "cropped", "pan and scan", "tiles"):
        preprocessor = rule(tmp_path / name, name)
        for seed, (width, height) in enumerate(sizes):
            image = canonical(noise(width, height, seed))
            torch.set_num_threads(1)
            (expected,) = patches_of(preprocessor, [image])
            torch.set_num_threads(5)
            with spread_over_threads(width * height) as spread:
                assert spread is not run_serially
            assert torch.equal(patches_of(preprocessor, [image])[0], expected)


def test_a_small_image_and_a_single_thread_start_no_thread(restore_threads: None) -> None:
    torch.set_num_threads(2)
    with spread_over_threads(400) as spread:
        assert spread is run_serially
    torch.set_num_threads(1)
    with spread_over_threads(10**7) as spread:
        assert spread is run_serially


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of these tests are resized in many pieces."""
    monkeypatch.setattr(pillow_resize, "PIECE", 900)


def by_pillow(image: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    return np.asarray(Image.fromarray(image).resize(size, resample=resample))


def in_three(work: Callable[[slice], None], count: int) -> None:
    for part in range(3):
        work(slice(count * part // 3, count * (part + 1) // 3))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("resample", sorted(pillow_resize.FILTERS))
@pytest.mark.parametrize("spread", [run_serially, in_three])
def test_resizing_piece_by_piece_is_pillows_bit_for_bit(resample: int, spread: Spread) -> None:
    generator = np.random.default_rng(resample)
    # Beside sizes of all kinds, those around the limit where Pillow 13 changes the order of its passes, and one-way ones.
    sizes = [((40, 90), (40 - loss, 90 - 2 * loss + more)) for loss in range(-20, 30, 7) for more in (-1, 0, 1)]
    sizes += [((70, 50), (70, 21)), ((70, 50), (33, 50)), ((1, 90), (1, 35)), ((90, 1), (35, 1)), ((60, 60), (1, 1))]
    sizes += [((old[0], old[1]), (new[0], new[1])) for old, new in generator.integers(1, 160, (120, 2, 2)).tolist()]
    for old, new in sizes:
        image = generator.integers(0, 256, (old[1], old[0], 3), np.uint8)
        assert np.array_equal(resize_image(image, new, resample, spread), by_pillow(image, new, resample)), (old, new)


def test_large_images_piece_by_piece() -> None:
    for old, new in [((1024, 1024), (1036, 1036)), ((900, 1500), (504, 700)), ((700, 1300), (672, 448))]:
        image = noise(*old)
        assert np.array_equal(resize_image(image, new, 3), by_pillow(image, new, 3))


def test_the_order_of_pillows_passes_is_known() -> None:
    newer = int(pillow_version.split(".")[0]) >= 13
    assert order_axes((300, 200), (150, 190), 3) == (1, 0)
    assert order_axes((300, 200), (290, 150), 3) == ((0, 1) if newer else (1, 0))
    assert order_axes((300, 200), (300, 150), 3) == (0,)
    assert order_axes((300, 200), (200, 200), 3) == (1,)


@pytest.mark.usefixtures("pieces")
def test_where_the_order_is_not_known_channels_are_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def height_first(array: Bytes, size: tuple[int, int], resample: int) -> Bytes:
        return by_pillow(by_pillow(array, (array.shape[1], size[1]), resample), size, resample)

    monkeypatch.setattr(pillow_resize, "resize_by_pillow", height_first)
    pillow_resize.find_axis_order.cache_clear()
    try:
        assert order_axes((100, 80), (50, 60), 3) is None
        for new in [(50, 60), (130, 140), (90, 20)]:
            image = noise(100, 80)
            for spread in (run_serially, in_three):
                assert np.array_equal(resize_image(image, new, 3, spread), height_first(image, new, 3))
    finally:
        pillow_resize.find_axis_order.cache_clear()


def test_large_arrays_begin_with_a_huge_page() -> None:
    for shape, dtype in [((HUGE_PAGE,), np.uint8), ((1024, 588), np.float32), ((5, 7, 100003), np.uint8)]:
        array = allocate_array(shape, dtype)
        array[...] = 3
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.ctypes.data % HUGE_PAGE == 0
    assert allocate_array((3, 5), np.float32).shape == (3, 5)


# -- digests ----------------------------------------------------------------------------------------------------------


def test_nobody_asks_for_digests_and_none_is_taken(tmp_path: Path) -> None:
    preprocessor = rule(tmp_path, "area")
    for images in ([canonical(noise(300, 200))], [canonical(noise(300, 200)), canonical(noise(90, 80))]):
        batch = preprocessor.preprocess_images(images)
        assert not any("digest" in vars(image) for image in images)
        assert batch.images.content_hashes == tuple(image.digest for image in images)


def test_what_is_much_larger_than_its_patches_is_not_kept(tmp_path: Path, restore_threads: None) -> None:
    preprocessor = rule(tmp_path, "squashed")  # 56 × 56, whatever comes
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for sizes in ([(900, 700)], [(900, 700), (60, 60), (300, 800)], [(80, 70), (56, 56)]):
            images = [canonical(noise(*size)) for size in sizes]
            batch = preprocessor.preprocess_images(images, raw=True)
            taken = [size for size, image in zip(sizes, images, strict=True) if "digest" in vars(image)]
            assert taken == [size for size in sizes if size[0] * size[1] > 2 * 56 * 56]
            assert batch.images.content_hashes == tuple(canonical(noise(*size)).digest for size in sizes)


def test_an_image_may_change_once_it_is_preprocessed(tmp_path: Path) -> None:
    array = noise(90, 80)
    expected = canonical(array.copy()).digest
    batch = rule(tmp_path, "area").preprocess_images([decode_image(array)])
    array[:] = 0
    assert batch.images.content_hashes[0] == expected


def test_an_error_beside_an_image_is_not_lost(restore_threads: None) -> None:
    def fail() -> None:
        raise OSError("beside")

    for threads in (1, 2):
        torch.set_num_threads(threads)
        with pytest.raises(OSError, match="beside"), spread_over_threads(10**6, fail):
            pass


def test_the_cut_leaves_out_what_is_no_whole_patch() -> None:
    image = noise(11, 14)
    raw, values = np.empty((6, 48), np.uint8), np.empty((6, 48), np.float32)
    cut_bytes(image, 4, 1, raw)
    cut_values(image, 4, 1, PixelNormalization(1.0, (0.0,) * 3, (1.0,) * 3), values)
    assert np.array_equal(raw, values)
    assert np.array_equal(raw[5].reshape(3, 4, 4), image[8:12, 4:8].transpose(2, 0, 1))


def test_an_image_that_has_its_size_is_not_copied() -> None:
    image = noise(28, 56)
    assert resize_image(image, (28, 56), 3) is image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "I;16"])
def test_images_of_every_mode_are_canonical_first(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(noise(70, 45))
    if mode == "I;16":
        image = Image.fromarray(noise(70, 45)[..., 0].astype(np.uint16) << 8)
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(noise(70, 45, 1)[..., 0]))
    else:
        image = image.convert(mode)
    for name in SETTINGS:
        preprocessor = rule(tmp_path / name, name)
        decoded = decode_image(image)
        assert torch.equal(patches_of(preprocessor, [decoded])[0], by_processor(preprocessor, decoded))


@each_rule
def test_images_do_not_depend_on_each_other_or_on_threads(tmp_path: Path, name: str) -> None:
    preprocessor = rule(tmp_path, name)
    images = [canonical(noise(*size, seed)) for seed, size in enumerate(random_sizes(12, largest=200, seed=3))]
    expected = [patches_of(preprocessor, [image])[0] for image in images]
    fresh = rule(tmp_path, name)
    with ThreadPoolExecutor(6) as pool:
        batches = list(pool.map(lambda _: fresh.preprocess_images(images, each=pool_of_two_map), range(8)))
    for batch in batches:
        for rows, alone_rows in zip(batch.pixels.split(list(map(len, expected))), expected, strict=True):
            assert torch.equal(rows, alone_rows)


def pool_of_two_map(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, *arguments))


# -- where transformers is asked --------------------------------------------------------------------------------------


class Darker(CLIPImageProcessorPil):
    """Somebody's own processor."""

    def rescale(self, image: np.ndarray, scale: float, **arguments: Any) -> np.ndarray:
        return super().rescale(image, scale / 2, **arguments)


CLIP = {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}}


def fixed(given: Any, folder: Path) -> Preprocessor:
    return make_rule(FixedSize, SQUARE, folder, LIMITS, given)


def test_a_subclass_is_asked_itself(tmp_path: Path) -> None:
    image = canonical(noise(80, 70))
    usual, darker = (fixed(kind(**CLIP), tmp_path) for kind in (CLIPImageProcessorPil, Darker))
    assert usual.fast_path is not None
    assert darker.fast_path is None
    (rows,) = patches_of(darker, [image])
    assert torch.equal(rows, by_processor(darker, image))
    assert not torch.equal(rows, patches_of(usual, [image])[0])


def test_a_method_replaced_on_the_object_is_called(tmp_path: Path) -> None:
    image, patched = canonical(noise(80, 70)), CLIPImageProcessorPil(**CLIP)
    patched.rescale = lambda image, scale, **_: np.zeros(image.shape, np.float32)
    preprocessor = fixed(patched, tmp_path)
    assert preprocessor.fast_path is None
    (rows,) = patches_of(preprocessor, [image])
    assert (rows.unflatten(1, (3, -1)) == rows[0].unflatten(0, (3, -1))[:, :1]).all()


def test_a_class_that_has_changed_under_us_fails_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, normalize = canonical(noise(80, 70)), CLIPImageProcessorPil.normalize

    def shifted(self: Any, image: np.ndarray, *arguments: Any, **named: Any) -> np.ndarray:
        return np.nextafter(normalize(self, image, *arguments, **named), np.float32(9))

    monkeypatch.setattr(CLIPImageProcessorPil, "normalize", shifted)
    preprocessor = fixed(CLIPImageProcessorPil(**CLIP), tmp_path)
    assert preprocessor.fast_path is None
    assert torch.equal(patches_of(preprocessor, [image])[0], by_processor(preprocessor, image))


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("cropped beyond its sides", {"do_pad": True}, {}),
        ("edge", {"do_center_crop": True, "crop_size": 16}, {}),
        ("squashed", {}, {"rescale_factor": "a lot"}),
        ("squashed", {}, {"do_rescale": None}),
        ("squashed", {}, {"resample": None}),
        ("squashed", {}, {"resample": 17}),
        ("squashed", {}, {"resample": True}),
        ("squashed", {}, {"image_mean": [0.5, 0.5]}),
        ("squashed", {}, {"image_mean": [0, 1, 1]}),
        ("squashed", {}, {"image_std": [0.5, 0.0, 0.5]}),
        ("squashed", {}, {"image_std": [0.5, "x", 0.5]}),
        ("squashed", {}, {"image_mean": None, "do_normalize": 1}),
    ],
)
def test_settings_that_are_not_known_go_to_transformers(
    tmp_path: Path, name: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    assert rule(tmp_path, name, options, **changes).fast_path is None


def test_padding_to_a_square_is_still_transformers(tmp_path: Path) -> None:
    preprocessor = rule(tmp_path, "cropped beyond its sides", do_pad=True)
    image = canonical(noise(90, 40))
    assert torch.equal(patches_of(preprocessor, [image])[0], by_processor(preprocessor, image))


def test_a_rule_without_a_processor_has_no_fast_path(tmp_path: Path) -> None:
    preprocessor = make_rule(MistralResize, tower(merge=2), tmp_path, LIMITS, longest_edge=280)
    assert preprocessor.fast_path is None
    with pytest.raises(UsageError, match="raw must be False or None"):
        preprocessor.preprocess_images([canonical(noise(50, 60))], raw=True)
    assert preprocessor.preprocess_images([canonical(noise(50, 60))], raw=None).pixels.dtype == torch.float32


def test_limits_that_allow_no_probe_are_no_error_of_their_own(tmp_path: Path) -> None:
    kind, config, content, _ = SETTINGS["squashed"]
    preprocessor = make_rule(kind, config, write_settings(tmp_path, content), Limits(max_planned_pixels=100))
    assert preprocessor.fast_path is None
    with pytest.raises(ImageTooLargeError, match="limit is 100 pixels"):
        preprocessor.preprocess_images([canonical(noise(50, 60))])


# -- bytes ------------------------------------------------------------------------------------------------------------


@each_rule
def test_bytes_are_what_the_values_are_made_of(tmp_path: Path, name: str) -> None:
    preprocessor = rule(tmp_path, name)
    images = [canonical(noise(*size, seed)) for seed, size in enumerate([(80, 60), (33, 150), (1, 1)])]
    usual, raw = (preprocessor.preprocess_images(images, raw=raw) for raw in (False, True))
    assert usual.pixels.dtype == torch.float32
    assert raw.pixels.dtype == torch.uint8
    assert torch.equal(preprocessor.normalize(raw).pixels, usual.pixels)
    assert preprocessor.normalize(usual) is usual
    assert torch.equal(preprocessor.preprocess_images(images, raw=None).pixels, raw.pixels)
    assert raw.images.content_hashes == usual.images.content_hashes
    assert torch.equal(raw.attention.positions, usual.attention.positions)


def test_a_class_token_is_a_row_that_counts_zero(tmp_path: Path) -> None:
    kind, _, content, _ = SETTINGS["cropped"]
    preprocessor = make_rule(kind, tower(table_side=4, class_token=True), write_settings(tmp_path, content), LIMITS)
    images = [canonical(noise(80, 60)), canonical(noise(60, 90))]
    usual, raw = (preprocessor.preprocess_images(images, raw=raw) for raw in (False, True))
    rows = raw.tokens.class_rows.flatten().long()
    assert rows.tolist() == [0, 17]
    assert (raw.pixels[rows] == PIXEL_CENTER).all()
    assert (usual.pixels[rows] == 0).all()
    assert torch.equal(preprocessor.normalize(raw).pixels, usual.pixels)


def test_bytes_of_an_unknown_processor_are_refused(tmp_path: Path) -> None:
    preprocessor = fixed(Darker(**CLIP), tmp_path)
    images = [canonical(noise(80, 70))]
    with pytest.raises(UsageError, match="cannot be packed as bytes"):
        preprocessor.preprocess_images(images, raw=True)
    assert preprocessor.preprocess_images(images, raw=None).pixels.dtype == torch.float32
    raw = fixed(CLIPImageProcessorPil(**CLIP), tmp_path).preprocess_images(images, raw=True)
    with pytest.raises(UsageError, match="cannot be packed as bytes"):
        preprocessor.normalize(raw)


class Own(Qwen2VLImageProcessorPil):
    """Somebody's own processor, which does what the usual one does."""


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_videos_are_those_of_the_processor(tmp_path: Path, frames: int) -> None:
    bounds = {"min_pixels": 3136, "max_pixels": 20000}
    config = tower(merge=2, temporal=2)
    usual, own = (
        make_rule(SmartResize, config, tmp_path, LIMITS, kind(**bounds)) for kind in (Qwen2VLImageProcessorPil, Own)
    )
    video = [canonical(noise(110, 75, seed)) for seed in range(frames)]
    expected = own.preprocess_video(video, **bounds)
    assert own.fast_path is None
    assert usual.fast_path is not None
    assert torch.equal(usual.preprocess_video(video, **bounds).pixels, expected.pixels)
    with ThreadPoolExecutor(3) as pool:
        raw = usual.preprocess_video(video, raw=True, each=pool.map, **bounds)
    assert raw.pixels.dtype == torch.uint8
    assert torch.equal(usual.normalize(raw).pixels, expected.pixels)
    with pytest.raises(UsageError, match="cannot be packed as bytes"):
        own.preprocess_video(video, raw=True, **bounds)


def test_edges_of_a_pixtral_without_a_file(tmp_path: Path) -> None:
    content = {"size": {"longest_edge": 280}, "patch_size": 14}
    preprocessor = make_rule(LongestEdge, tower(merge=2), tmp_path, LIMITS, without_file=content)
    assert type(preprocessor.processor) is PixtralImageProcessorPil
    image = canonical(noise(300, 77))
    assert preprocessor.fast_path is not None
    assert torch.equal(patches_of(preprocessor, [image])[0], by_processor(preprocessor, image))
