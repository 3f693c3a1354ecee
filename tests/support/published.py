"""Published checkpoints without their weights: ``config.json`` and processor file, and what is known of their towers.

Configurations hold what concerns the tower: the examples of the families' own summaries, with the sizes of the other models
that share them.  The numbers beside them were worked out from the towers' published descriptions, not by this project:
parameters in millions, operations in 10¹² with two per multiply–add, both to the digits that are given here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritontower.models.common.family import FamilySummary, read_summary

__all__ = ["PUBLISHED", "ImageFacts", "PublishedTower", "write_published"]


@dataclass(frozen=True)
class ImageFacts:
    """What a square image becomes.

    Attributes:
        side: of the image as it comes, pixels.
        patches: rows that the blocks work on, class tokens left out.
        tokens: rows of its embedding.
        tera: operations of the pass, 10¹², as text, so that its digits say how precise it is.  They are those of the blocks
            that have to run (23 of LLaVA's 24); of an image in tiles, those of one tile without the projector.
        tiles: images and tiles that the tower sees.
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
        processor: the processor file; empty where there is none.
        tower_millions: parameters of all blocks that are published, needed or not, and of what stands before them; with
            the projector, where ``projector_millions`` is empty.
        projector_millions: parameters of the projector.
        images: what images become.
        file: name of the configuration file.
    """

    name: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    tower_millions: str
    projector_millions: str = ""
    images: Sequence[ImageFacts] = ()
    file: str = "config.json"


def write_published(folder: Path, tower: PublishedTower) -> Path:
    """The checkpoint's folder, as it is before any weights are fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / tower.file).write_text(json.dumps(tower.config))
    if tower.processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(tower.processor))
    return folder


QWEN2, QWEN2_5, QWEN3, QWEN3_5 = map(read_summary, ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"))
PIXTRAL, MISTRAL3, PIXTRAL_PARAMS = map(read_summary, ("pixtral", "mistral3", "pixtral_mistral_format"))
LLAVA, ONEVISION = map(read_summary, ("llava", "llava_onevision"))
PALIGEMMA, GEMMA3 = map(read_summary, ("paligemma", "gemma3"))

SMALL_QWEN3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
PIXTRAL_IMAGES = (ImageFacts(448, 784, 784, "0.74"), ImageFacts(1024, 4096, 4096, "5.21"))


def _varied(
    name: str,
    summary: FamilySummary,
    millions: str,
    projector: str = "",
    images: Sequence[ImageFacts] = (),
    **changes: Any,
) -> PublishedTower:
    """A checkpoint whose files are those of a family's example, but for ``changes``: of the top level or of its sections."""
    sections = {
        key: {**summary.example[key], **value}
        for key, value in changes.items()
        if isinstance(value, Mapping) and key in summary.example
    }
    config = {**summary.example, **changes, **sections}
    return PublishedTower(name, config, summary.processor, millions, projector, images, file=summary.config_file)


def _qwen2_vl(size: str, output: int, millions: str, images: Sequence[ImageFacts] = ()) -> PublishedTower:
    vision = {"hidden_size": output}
    name = f"Qwen2-VL-{size}-Instruct"
    return _varied(name, QWEN2, millions, "", images, hidden_size=output, vision_config=vision)


def _qwen2_5_vl(size: str, output: int, mlp: int, millions: str, images: Sequence[ImageFacts] = ()) -> PublishedTower:
    vision = {"intermediate_size": mlp, "out_hidden_size": output}
    name = f"Qwen2.5-VL-{size}-Instruct"
    return _varied(name, QWEN2_5, millions, "", images, hidden_size=output, vision_config=vision)


def _qwen3_vl(
    size: str,
    output: int,
    millions: str,
    images: Sequence[ImageFacts] = (),
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
    images = [ImageFacts(side, 4096, 256, "5.46") for side in (448, 1024)]
    return _varied(f"gemma-3-{size}-it", GEMMA3, "416.9", projector, images, text_config={"hidden_size": width})


def _llava(size: str, text: Mapping[str, Any], projector: str, tera: str) -> PublishedTower:
    images = [ImageFacts(side, 576, 576, tera) for side in (448, 1024)]
    return _varied(f"llava-1.5-{size}-hf", LLAVA, "303.5", projector, images, text_config=text)


PUBLISHED = (
    _qwen2_vl("2B", 1536, "665.3"),
    _qwen2_vl("7B", 3584, "675.8", [ImageFacts(448, 1024, 256, "1.49"), ImageFacts(1024, 5476, 1369, "11.94")]),
    _qwen2_vl("72B", 8192, "699.4"),
    _qwen2_5_vl("3B", 2048, 3420, "668.7"),
    _qwen2_5_vl("7B", 3584, 3420, "676.6", [ImageFacts(448, 1024, 256, "1.35"), ImageFacts(1024, 5476, 1369, "7.70")]),
    _qwen2_5_vl("32B", 5120, 3456, "688.8"),
    _qwen2_5_vl("72B", 8192, 3456, "704.6"),
    _qwen3_vl("2B", 2048, "407.0", vision=SMALL_QWEN3),
    _qwen3_vl(
        "4B",
        2560,
        "415.3",
        [ImageFacts(448, 784, 196, "0.58"), ImageFacts(1024, 4096, 1024, "4.36")],
        vision=SMALL_QWEN3,
    ),
    _qwen3_vl("8B", 4096, "576.4", [ImageFacts(448, 784, 196, "0.79"), ImageFacts(1024, 4096, 1024, "5.80")]),
    _qwen3_vl("32B", 5120, "595.3"),
    _qwen3_vl("30B-A3B", 2048, "538.6", model_type="qwen3_vl_moe"),
    _qwen3_vl("235B-A22B", 4096, "576.4", model_type="qwen3_vl_moe"),
    _varied(
        "Qwen3.5-27B",
        QWEN3_5,
        "460.7",
        images=[ImageFacts(448, 784, 196, "0.74"), ImageFacts(1024, 4096, 1024, "5.56")],
    ),
    _varied("pixtral-12b", PIXTRAL, "403.5", "31.5", PIXTRAL_IMAGES),
    _varied("Pixtral-12B-2409", PIXTRAL_PARAMS, "403.5", "31.5", PIXTRAL_IMAGES),
    _varied(
        "Mistral-Small-3.1-24B-Instruct-2503",
        MISTRAL3,
        "403.3",
        "35.7",
        [ImageFacts(448, 1024, 256, "0.95"), ImageFacts(1024, 5476, 1369, "7.46")],
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
        # Two or three tiles a side, with a newline behind every row of theirs, and the whole image.
        [
            ImageFacts(448, 5 * 729, 729 + 54 * 55, "0.64", tiles=5),
            ImageFacts(1024, 10 * 729, 729 + 81 * 82, "0.64", tiles=10),
        ],
    ),
    _varied(
        "paligemma-3b-pt-224",
        PALIGEMMA,
        "412.4",
        "2.4",
        [ImageFacts(side, 256, 256, "0.22") for side in (448, 1024)],
    ),
)
