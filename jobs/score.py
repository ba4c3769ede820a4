"""``raydpo score`` as the entry point of a Ray job:

    raydpo submit score CONFIG [key.sub=value ...]
    ray job submit --working-dir . -- python jobs/score.py CONFIG [key.sub=value ...]
"""

import sys

from raydpo.cli import job

if __name__ == "__main__":
    sys.exit(job("score"))
