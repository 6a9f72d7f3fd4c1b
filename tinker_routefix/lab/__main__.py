"""``python -m tinker_routefix.lab``, as ``tinker-routefix lab``."""

import sys

from tinker_routefix._cli import main

if __name__ == "__main__":
    sys.exit(main(["lab", *sys.argv[1:]]))
