"""Encode photographs with a full-size tower, compare with transformers, and draw the patch features.

Without --model the tower is Qwen2-VL-2B's with random weights, made once and kept; nothing is downloaded.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritontower.text_table import text_table

from .options import add_bounds, add_device_and_dtype, add_images, load_tower, read_bounds
from .parity import describe as describe_parity

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from tritontower import ImageEmbedding, PackedBatch, VisionTower
    from tritontower.graph.ir import Node
    from tritontower.preprocessing import Bounds


BATCH_TOLERANCE = 1e-2
"""Largest relative distance of an embedding alone and in a batch, on a GPU: a few 16-bit roundings."""

EXAMPLE = "tritontower demo holiday.jpg diagram.png --output demo-output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds images, model, device, parity mode and output folder."""
    add_images(parser, required=False, without="three photographs from scikit-image")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint with real weights, a local folder or a hub id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add_device_and_dtype(parser)
    add_bounds(parser)
    folder_help = "folder of the drawing (default: demo-output)"
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="FOLDER", help=folder_help)
    parser.add_argument(
        "--parity",
        choices=("smallest", "all", "none"),
        default="all",
        help="images to compare with transformers, the longest part (default: all)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the demonstration; returns 1 if the parity check fails."""
    from tritontower.parity.parity import compare, relative_error

    names, images = _images(arguments.images)
    if arguments.model is None:
        from tritontower.demo.checkpoint import demonstration_checkpoint

        arguments.model = demonstration_checkpoint()
    tower = load_tower(arguments)
    bounds = read_bounds(arguments)
    print(
        f"A tower of {tower.config.depth} blocks, {tower.config.width} wide, {tower.graph.parameters / 1e6:,.0f} M "
        f"parameters, in {str(tower.dtype).removeprefix('torch.')} on {tower.device}\n"
    )
    # Loads what is loaded on first use.
    tower.encode([image.resize((56, 56)) for image in images[:1]])
    alone = [_timed(tower, [image], bounds) for image in images]
    packed, packed_ms = _timed(tower, images, bounds)
    print(_table(names, packed, [milliseconds for _, milliseconds in alone]))
    pairs = [(one.embeddings, many.embeddings) for ((one,), _), many in zip(alone, packed, strict=True)]
    difference = max(relative_error(one, many) for one, many in pairs)
    agreement = f"relative distance {difference:.1e} to" if difference else "bit for bit equal to"
    print(f"\nAll {len(images)} in one packed batch: {packed_ms:,.0f} ms, {agreement} each image alone\n")
    # A GPU may split K of matmuls with few rows, and then sums in another order.
    passed = difference == 0.0 or (tower.device.type != "cpu" and difference < BATCH_TOLERANCE)
    if arguments.parity != "none":
        smallest = min(range(len(images)), key=lambda index: packed[index].num_tokens)
        chosen = [smallest] if arguments.parity == "smallest" else range(len(images))
        parity = compare(tower, tower.preprocess([images[index] for index in chosen], **bounds))
        passed = passed and parity.passed
        print(f"{describe_parity(parity)} (compared: {', '.join(names[index] for index in chosen)})\n")
    batch = tower.preprocess(images, **bounds)
    print(f"Patch features as colors: {_draw(names, images, _patch_features(tower, batch), arguments.output)}")
    return 0 if passed else 1


def _images(paths: Sequence[Path]) -> tuple[list[str], list["Image.Image"]]:
    """Names and images of the command line, or the demonstration's photographs."""
    if not paths:
        from tritontower.demo.checkpoint import demonstration_images

        photographs = demonstration_images()
        return list(photographs), list(photographs.values())
    from PIL import Image

    from tritontower.preprocessing.images.decode import decode_image

    images = [decode_image(path, index=index) for index, path in enumerate(paths)]
    return [path.name for path in paths], [Image.fromarray(image.array) for image in images]


def _timed(
    tower: "VisionTower", images: Sequence["Image.Image"], bounds: "Bounds"
) -> tuple[list["ImageEmbedding"], float]:
    """Embeddings on the CPU, and the milliseconds that they took."""
    start = time.perf_counter()
    embeddings = [embedding.to("cpu") for embedding in tower.encode(images, **bounds)]
    return embeddings, (time.perf_counter() - start) * 1e3


def _table(names: Sequence[str], embeddings: Sequence["ImageEmbedding"], milliseconds: Sequence[float]) -> str:
    rows = []
    for name, embedding, duration in zip(names, embeddings, milliseconds, strict=True):
        size, grid = "{} × {}".format(*embedding.original_size), "{1} × {2}".format(*embedding.grid_thw)
        rows.append((name, size, grid, embedding.num_tokens, f"{duration:,.0f}"))
    return text_table("", ("image", "size", "patches", "tokens", "ms alone"), rows)


def _patch_features(tower: "VisionTower", batch: "PackedBatch") -> list["torch.Tensor"]:
    """Output of the last block, ``[rows, columns, width]`` for the first tile of each image."""
    import torch

    last = f"blocks.{tower.config.blocks_needed - 1}.block_rows"
    kept: list[torch.Tensor] = []

    def keep(node: "Node", tensors: Mapping[str, "torch.Tensor"]) -> None:
        if last in node.outputs:
            # A later node may overwrite these rows.
            kept.append(tensors[last].to("cpu", torch.float32, copy=True))

    tower.executor_for(batch).run(batch.to(tower.device), keep)
    class_rows = 1 if tower.config.class_token else 0
    lengths = batch.attention.tiles.lengths
    tiles, positions = kept[0].split(lengths), batch.attention.positions.long().split(lengths)
    maps, first = [], 0
    for count in batch.images.tile_counts:
        features, (rows, columns) = tiles[first][class_rows:], positions[first][class_rows:].unbind(1)
        in_place = features.new_empty(*batch.images.tile_grids[first][1:], features.shape[1])
        in_place[rows, columns] = features
        maps.append(in_place)
        first += count
    return maps


def _draw(
    names: Sequence[str], images: Sequence["Image.Image"], features: Sequence["torch.Tensor"], folder: Path
) -> Path:
    """Writes the images and their patch features as PNG; returns the path."""
    from tritontower.demo.pca import principal_component_image, side_by_side

    maps = [principal_component_image(part.flatten(0, 1), *part.shape[:2]) for part in features]
    titles = [f"{name}: {part.shape[0]} × {part.shape[1]} patches" for name, part in zip(names, features, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "features.png"
    side_by_side(images, maps, titles).save(path)
    return path
