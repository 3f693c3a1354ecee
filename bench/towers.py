"""Compares a whole tower with transformers: ``tritontower bench towers``, from a checkout."""

import sys

from tritontower.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "towers", *sys.argv[1:]]))
