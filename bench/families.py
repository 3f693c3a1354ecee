"""Compares every family's tower with transformers, at its published width with random weights.

    python -m bench.families                                 # all families, 8 blocks each, one image of 448 × 448
    python -m bench.families --family Qwen2.5-VL --batch mixed --depth 0

This is ``tritontower bench towers --family all --depth 8``.  Blocks repeat, so the depth hardly changes the ratio; patch
projection and projector count for more than at the published depth (``--depth 0``).
"""

import sys

from tritontower.cli import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if not any(word.split("=")[0] == "--family" for word in words):
        words = ["--family", "all", *words]
    sys.exit(main(["bench", "towers", "--depth", "8", *words]))
