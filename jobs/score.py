"""``raydpo score`` as the entry point of a Ray job:

    raydpo submit score CONFIG [key.sub=value ...]
    raydpo submit score CONFIG [key.sub=value ...] --dry-run      # the same as a command of Ray's own client
"""

import sys

from raydpo.cli import job

if __name__ == "__main__":
    sys.exit(job("score"))
