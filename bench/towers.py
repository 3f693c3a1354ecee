"""A whole tower against transformers: ``tritontower bench towers``, from a checkout (``python -m bench.towers --help``)."""

import sys

from tritontower.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "towers", *sys.argv[1:]]))
