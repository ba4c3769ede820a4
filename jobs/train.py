"""Entry point of ``raydpo train`` as a Ray job:

raydpo submit train CONFIG [key.sub=value ...]
raydpo submit train CONFIG [key.sub=value ...] --dry-run      # prints the command for Ray's own client
"""

import sys

from raydpo.cli.entry import job

if __name__ == "__main__":
    sys.exit(job("train"))
