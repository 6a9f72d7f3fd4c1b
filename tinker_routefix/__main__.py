"""``python -m tinker_routefix``: the command line, as ``tinker-routefix``."""

import sys

from ._cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
