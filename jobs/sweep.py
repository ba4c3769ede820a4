"""Entry point of ``raydpo sweep`` as a Ray job:

raydpo submit sweep CONFIG [key.sub=value ...]
raydpo submit sweep CONFIG [key.sub=value ...] --dry-run      # prints the command for Ray's own client
"""

import sys

from raydpo.cli.entry import job

if __name__ == "__main__":
    sys.exit(job("sweep"))
