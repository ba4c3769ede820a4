"""Measure how many pairs a second of one core are read, rendered and tokenised; run by hand on a quiet machine.

    python tests/data/speed.py prefs.jsonl --tokenizer /models/SmolLM2-135M-Instruct --times 4

Loads a file with the tokenizer's own template and with a long one that asks much of each message, in turns with and without
the shorter ways to token ids, compares the ids, and prints the best of each in pairs per CPU second.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from by_the_book import by_the_book

from raydpo.config import DataConfig
from raydpo.data.pairs import load_pairs
from raydpo.data.tokenise import Tokeniser, load_tokenizer

LONG = str(Path(__file__).parent / "thinking.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--times", type=int, default=4)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in processes that share a machine
    config = DataConfig(train=given.data, max_length=1_000_000)
    for name, template in (("own", None), ("long", LONG)):
        tokenizer = load_tokenizer(given.tokenizer, chat_template=template)
        best: dict[str, float] = {}
        for _ in range(given.times):
            found = []
            for way, make in (("plain", by_the_book), ("short", Tokeniser)):
                start = time.process_time()
                sets = load_pairs(config, make(tokenizer))
                used = time.process_time() - start
                best[way] = max(best.get(way, 0.0), sets.report.sources[0].pairs / used)
                found.append((sets.train, sets.report.lines()))
            assert found[0][0].equals(found[1][0]) and found[0][1] == found[1][1]
        print(
            f"{name} template: {best['plain']:,.0f} pairs a CPU second the plain way, {best['short']:,.0f} the short way, "
            f"{best['short'] / best['plain']:.2f} times as many",
            flush=True,
        )


if __name__ == "__main__":
    main()
