"""raydpo against TRL on the same pairs, in one run. On any machine, Ray and DeepSpeed installed or not:

    python jobs/benchmark.py --model PATH --data FILE --pairs 64 --dtype bf16 --lora 16 --json OUT.json
    python jobs/benchmark.py --model random-1b --synthetic --full --json OUT.json

or as a Ray job, whose report is its log:

    raydpo submit benchmark --gpus 1 -- --model random-1b --synthetic --full
    raydpo submit benchmark --gpus 1 --dry-run -- --model random-1b --synthetic --full     # as a command of Ray's own client
"""

import sys

from raydpo.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main())
