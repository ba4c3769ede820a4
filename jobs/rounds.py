"""Entry point of ``raydpo rounds`` as a Ray job:

raydpo submit rounds CONFIG [key.sub=value ...] --include prompts.jsonl
raydpo submit rounds CONFIG [key.sub=value ...] --dry-run      # prints the command for Ray's own client
"""

import sys

from raydpo.cli.entry import job

if __name__ == "__main__":
    sys.exit(job("rounds"))
