"""Entry point of ``raydpo score`` as a Ray job:

raydpo submit score CONFIG [key.sub=value ...]
raydpo submit score CONFIG [key.sub=value ...] --dry-run      # prints the command for Ray's own client
"""

import sys

from raydpo.cli.entry import job

if __name__ == "__main__":
    sys.exit(job("score"))
