"""Published checkpoints without their weights: ``config.json``, processor file, and known numbers of their towers.

Configurations are the examples of the models' summaries, with the sizes of other published models.  The numbers were computed
from the published descriptions, not by this project: parameters in millions, operations in 10¹² with two per multiply–add, to
the given digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritontower.models.common.family import FamilySummary, read_summary


@dataclass(frozen=True)
class PublishedImage:
    """Numbers of a square image.

    Attributes:
        side: before resizing, pixels.
        patches: rows of the blocks, without class tokens.
        tokens: rows of its embedding.
        tera: operations of the needed blocks (23 of LLaVA's 24), 10¹², as text with its digits; of tiled images those of one
            tile, without the projector.
        tiles: of the image.
    """

    side: int
    patches: int
    tokens: int
    tera: str
    tiles: int = 1


@dataclass(frozen=True)
class PublishedTower:
    """One checkpoint.

    Attributes:
        name: of the repository, without its owner.
        config: the configuration file.
        summary: example of the family.
        tower_millions: parameters of all published blocks, needed or not; with the projector if ``projector_millions`` is
            empty.
        projector_millions: parameters of the projector.
        images: numbers of images.
    """

    name: str
    config: Mapping[str, Any]
    summary: FamilySummary
    tower_millions: str
    projector_millions: str = ""
    images: Sequence[PublishedImage] = ()


QWEN2, QWEN2_5, QWEN3, QWEN3_5 = map(read_summary, ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"))
PIXTRAL, MISTRAL3, PIXTRAL_PARAMS = map(read_summary, ("pixtral", "mistral3", "pixtral_mistral_format"))
LLAVA, ONEVISION = map(read_summary, ("llava", "llava_onevision"))
PALIGEMMA, GEMMA3 = map(read_summary, ("paligemma", "gemma3"))

SMALL_QWEN3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
PIXTRAL_IMAGES = (PublishedImage(448, 784, 784, "0.74"), PublishedImage(1024, 4096, 4096, "5.21"))


def _varied(
    name: str,
    summary: FamilySummary,
    millions: str,
    projector: str = "",
    images: Sequence[PublishedImage] = (),
    **changes: Any,
) -> PublishedTower:
    """Returns a family's example with ``changes`` of the top level or of its sections."""
    sections = {
        key: {**summary.example[key], **value}
        for key, value in changes.items()
        if isinstance(value, Mapping) and key in summary.example
    }
    config = {**summary.example, **changes, **sections}
    return PublishedTower(name, config, summary, millions, projector, images)


def _two_sizes(small: int, small_tera: str, large: int, large_tera: str) -> list[PublishedImage]:
    """Returns images of 448 and 1,024 pixels with these numbers of patches, four of which make a token."""
    return [PublishedImage(448, small, small // 4, small_tera), PublishedImage(1024, large, large // 4, large_tera)]


def _qwen2(
    name: str, summary: FamilySummary, output: int, millions: str, images: Sequence[PublishedImage] = (), **vision: Any
) -> PublishedTower:
    vision["hidden_size" if summary is QWEN2 else "out_hidden_size"] = output
    return _varied(f"{name}-Instruct", summary, millions, "", images, hidden_size=output, vision_config=vision)


def _qwen3_vl(
    size: str,
    output: int,
    millions: str,
    images: Sequence[PublishedImage] = (),
    *,
    model_type: str = "qwen3_vl",
    vision: Mapping[str, Any] | None = None,
) -> PublishedTower:
    changes = {
        "model_type": model_type,
        "text_config": {"hidden_size": output, "model_type": f"{model_type}_text"},
        "vision_config": {"model_type": model_type, "out_hidden_size": output, **(vision or {})},
    }
    return _varied(f"Qwen3-VL-{size}-Instruct", QWEN3, millions, "", images, **changes)


def _gemma3(size: str, width: int, projector: str) -> PublishedTower:
    images = [PublishedImage(side, 4096, 256, "5.46") for side in (448, 1024)]
    return _varied(f"gemma-3-{size}-it", GEMMA3, "416.9", projector, images, text_config={"hidden_size": width})


def _llava(size: str, text: Mapping[str, Any], projector: str, tera: str) -> PublishedTower:
    images = [PublishedImage(side, 576, 576, tera) for side in (448, 1024)]
    return _varied(f"llava-1.5-{size}-hf", LLAVA, "303.5", projector, images, text_config=text)


PUBLISHED = (
    _qwen2("Qwen2-VL-2B", QWEN2, 1536, "665.3"),
    _qwen2("Qwen2-VL-7B", QWEN2, 3584, "675.8", _two_sizes(1024, "1.49", 5476, "11.94")),
    _qwen2("Qwen2-VL-72B", QWEN2, 8192, "699.4"),
    _qwen2("Qwen2.5-VL-3B", QWEN2_5, 2048, "668.7", intermediate_size=3420),
    _qwen2("Qwen2.5-VL-7B", QWEN2_5, 3584, "676.6", _two_sizes(1024, "1.35", 5476, "7.70"), intermediate_size=3420),
    _qwen2("Qwen2.5-VL-32B", QWEN2_5, 5120, "688.8", intermediate_size=3456),
    _qwen2("Qwen2.5-VL-72B", QWEN2_5, 8192, "704.6", intermediate_size=3456),
    _qwen3_vl("2B", 2048, "407.0", vision=SMALL_QWEN3),
    _qwen3_vl("4B", 2560, "415.3", _two_sizes(784, "0.58", 4096, "4.36"), vision=SMALL_QWEN3),
    _qwen3_vl("8B", 4096, "576.4", _two_sizes(784, "0.79", 4096, "5.80")),
    _qwen3_vl("32B", 5120, "595.3"),
    _qwen3_vl("30B-A3B", 2048, "538.6", model_type="qwen3_vl_moe"),
    _qwen3_vl("235B-A22B", 4096, "576.4", model_type="qwen3_vl_moe"),
    _varied("Qwen3.5-27B", QWEN3_5, "460.7", images=_two_sizes(784, "0.74", 4096, "5.56")),
    # Without the class embedding, which is added to the position table.
    _varied("clip-vit-large-patch14", read_summary("clip"), "303.2"),
    _varied("siglip-so400m-patch14-384", read_summary("siglip"), "428.2"),
    _varied("shieldgemma-2-4b-it", read_summary("shieldgemma2"), "416.9", "2.95"),
    _varied("pixtral-12b", PIXTRAL, "403.5", "31.5", PIXTRAL_IMAGES),
    _varied("Pixtral-12B-2409", PIXTRAL_PARAMS, "403.5", "31.5", PIXTRAL_IMAGES),
    _varied(
        "Mistral-Small-3.1-24B-Instruct-2503",
        MISTRAL3,
        "403.3",
        "35.7",
        _two_sizes(1024, "0.95", 5476, "7.46"),
    ),
    _varied(
        "Mistral-Large-class",
        MISTRAL3,
        "2496",
        "182.5",
        text_config={"hidden_size": 12288},
        vision_config={"head_dim": 104, "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48},
    ),
    _gemma3("4b", 2560, "2.95"),
    _gemma3("12b", 3840, "4.4"),
    _gemma3("27b", 5376, "6.2"),
    _llava("7b", {}, "21.0", "0.39"),
    _llava("13b", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}, "31.5", "0.40"),
    _varied(
        "llava-onevision-qwen2-7b-ov-hf",
        ONEVISION,
        "397.7",
        "17.0",
        # Two or three tiles a side, with a newline after every row of theirs, and the whole image.
        [
            PublishedImage(448, 5 * 729, 729 + 54 * 55, "0.64", tiles=5),
            PublishedImage(1024, 10 * 729, 729 + 81 * 82, "0.64", tiles=10),
        ],
    ),
    _varied(
        "paligemma-3b-pt-224",
        PALIGEMMA,
        "412.4",
        "2.4",
        [PublishedImage(side, 256, 256, "0.22") for side in (448, 1024)],
    ),
)
