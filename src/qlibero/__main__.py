"""`python -m qlibero`: the same as `qlibero`."""

import sys

from qlibero.cli import main

if __name__ == "__main__":
    sys.exit(main())
