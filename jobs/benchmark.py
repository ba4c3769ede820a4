"""Benchmark of raydpo against TRL on the same pairs (needs ``pip install "raydpo[benchmark]"``):

    python jobs/benchmark.py --model PATH --data FILE --pairs 40,400 --dtype bf16 --lora 16 --json OUT.json
    python jobs/benchmark.py --model random-1b --random 512:512 --full --json OUT.json
    python jobs/benchmark.py --show OUT.json        # the tables as Markdown, without measuring

Or as a Ray job, which prints the result to its log:

    raydpo submit benchmark --gpus 1 -- --model random-1b --random 512:512 --full
    raydpo submit benchmark --gpus 1 --dry-run -- --model random-1b --random 512:512 --full   # prints Ray's own command
"""

import sys

from raydpo.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main())
