"""`python -m qlibero.cli`: what launchers start, whatever directory the `qlibero` script lies in."""

import sys

from qlibero.cli import main

if __name__ == "__main__":
    sys.exit(main())
