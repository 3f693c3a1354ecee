"""Every family's tower at its published width against transformers' own, on the same images and random weights.

    python -m bench.families                                 # all families, 8 blocks each, an image of 448 × 448
    python -m bench.families --family Qwen2.5-VL --pack mixed --depth 0

This is ``tritontower bench towers --family all --depth 8``.  The depth is cut (``--depth``, 0 for the published one):
blocks repeat, and a ratio hardly changes with their number; what does not repeat (patch projection, projector) counts for
more than it would, and a deepstack level behind a block that is cut away is left out.
"""

import sys

from tritontower.cli import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if not any(word.split("=")[0] == "--family" for word in words):
        words = ["--family", "all", *words]
    sys.exit(main(["bench", "towers", "--depth", "8", *words]))
