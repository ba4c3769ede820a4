"""``python -m raydpo.cli``: what submitted jobs start."""

import sys

from raydpo.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
