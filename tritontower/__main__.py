"""``python -m tritontower``: the command line, from a checkout as well as installed."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
