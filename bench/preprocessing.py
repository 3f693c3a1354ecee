"""Compares preprocessing with transformers' image processors, family by family.

    python -m bench.preprocessing                            # all families: 448², 1024², 2048², 16 of 224²
    python -m bench.preprocessing --family Qwen2-VL --size 900x700 --threads 1

This is ``tritontower bench preprocessing`` for several families; it reads configurations only, no weights.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from tritontower import VisionTower
from tritontower.benchmarks.documents import Report
from tritontower.benchmarks.images import family_configuration, family_titles
from tritontower.benchmarks.preprocessing import DEFAULT_SIZES, compare_preprocessing, preprocessing_table
from tritontower.cli.options import image_size, output_file, positive_integer
from tritontower.errors import TowerError, shorten


def main(words: Sequence[str] | None = None) -> int:
    """Measures each family; returns 1 if any pixels differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = family_titles()
    parser.add_argument(
        "--family", action="append", choices=titles, metavar="TITLE", help="may be repeated; default: all"
    )
    parser.add_argument("--size", type=image_size, action="append", metavar="WIDTHxHEIGHT", help="an image of noise")
    parser.add_argument("--repeats", type=positive_integer, default=7, metavar="N", help="measured runs (default: 7)")
    parser.add_argument("--threads", type=positive_integer, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write the report here, as JSON")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    sizes = {f"{width} × {height}": [(width, height)] for width, height in arguments.size or ()} or DEFAULT_SIZES
    report = Report("preprocessing", device=torch.device("cpu"), path=arguments.output)
    for title in arguments.family or titles:
        try:
            with family_configuration(title) as folder:
                tower = VisionTower.from_pretrained(folder, device="cpu", delay_load=True)
                for label, each in sizes.items():
                    row = compare_preprocessing(tower, label, each, repeats=arguments.repeats)
                    report.add({**row, "family": title, "label": f"{title}: {label}"})
        except TowerError as error:
            print(f"skipped {title}: {shorten(str(error), 160)}", file=sys.stderr)
    print(preprocessing_table(report.finish()))
    return int(any(row["status"] == "failed" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
