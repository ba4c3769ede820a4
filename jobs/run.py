"""``raydpo run`` as the entry point of a Ray job:

    raydpo submit run CONFIG [key.sub=value ...]
    ray job submit --working-dir . -- python jobs/run.py CONFIG [key.sub=value ...]
"""

import sys

from raydpo.cli import job

if __name__ == "__main__":
    sys.exit(job("run"))
