"""``raydpo train`` as the entry point of a Ray job:

    raydpo submit train CONFIG [key.sub=value ...]
    ray job submit --working-dir . -- python jobs/train.py CONFIG [key.sub=value ...]
"""

import sys

from raydpo.cli import job

if __name__ == "__main__":
    sys.exit(job("train"))
