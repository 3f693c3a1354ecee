"""Images to patches, every family's rule against transformers' own image processor, on the same images.

    python -m bench.preprocessing                            # all families: 448², 1024², 2048², 16 of 224²
    python -m bench.preprocessing --family Qwen2-VL --size 900x700 --threads 1

This is ``tritontower bench preprocessing`` for one family after the other; nothing is read but configurations.  Times are
medians of calls that take turns, and hold what both do with PIL images; what each candidate does, and which of its calls
count, is in ``tritontower/benchmarks/preprocessing.py``.
"""

import argparse
import sys

import torch

from tritontower.benchmarks.documents import Document, document, write_json
from tritontower.benchmarks.images import family_configuration, family_titles
from tritontower.benchmarks.preprocessing import DEFAULT_SIZES, benchmark_preprocessing, preprocessing_table
from tritontower.cli.options import image_size, output_file, positive_integer
from tritontower.errors import TowerError, shorten


def main() -> int:
    """Entry point; returns 1 if any pixels are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = family_titles()
    parser.add_argument(
        "--family", action="append", choices=titles, metavar="TITLE", help="may be repeated; default: all"
    )
    parser.add_argument("--size", type=image_size, action="append", metavar="WIDTHxHEIGHT", help="an image of noise")
    parser.add_argument("--repeats", type=positive_integer, default=7, metavar="N", help="runs that count (default: 7)")
    parser.add_argument("--threads", type=positive_integer, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write the report here, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = {f"{width} × {height}": [(width, height)] for width, height in arguments.size or ()} or DEFAULT_SIZES
    rows = []
    for title in arguments.family or titles:
        try:
            with family_configuration(title) as folder:
                found: Document = benchmark_preprocessing(folder, sizes=sizes, repeats=arguments.repeats)
        except TowerError as error:
            print(f"{title} is left out: {shorten(str(error), 160)}", file=sys.stderr)
            continue
        rows += [{**row, "family": title, "label": f"{title}, {row['label']}"} for row in found["rows"]]
    report = document("preprocessing", rows, device=torch.device("cpu"))
    print(preprocessing_table(report))
    if arguments.output is not None:
        write_json(arguments.output, report)
    return 1 if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
