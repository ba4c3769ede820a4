"""How references of 8 to 405 billion weights are put on 1 to 16 cards, against a table that can be checked by hand."""

import functools
import os
from pathlib import Path

import pytest

from raydpo.config.train import ScoreConfig
from raydpo.errors import ConfigError
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.ledger import BASE_BYTES, USABLE
from raydpo.model.memory.scoring import Links, ScoringRoom, choose_partition

HERE = Path(__file__).parent
GOLDEN = HERE / "reference_plans.txt"
GIB = 2**30
MODELS = {
    "8B": "Llama-3.1-8B-Instruct",
    "70B": "Llama-3.1-70B-Instruct",
    "123B": "Mistral-Large-Instruct-2407",
    "235B-A22B": "Qwen3-235B-A22B",
    "405B": "Llama-3.1-405B-Instruct",
}
CARDS, COUNTS, PER_MACHINE = (80, 141), (1, 2, 4, 8, 16), 8
PARAMETERS = {
    # Embedding and head, layers of queries and output, keys and values, gated part and two norms, and the last norm.
    "8B": 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096,
    "70B": 2 * 128256 * 8192 + 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 8192,
    "123B": 2 * 32768 * 12288 + 88 * (2 * 12288**2 + 2 * 12288 * 1024 + 3 * 12288 * 28672 + 2 * 12288) + 12288,
    "405B": 2 * 128256 * 16384 + 126 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248 + 2 * 16384) + 16384,
    # The same with 128 experts and their router; queries and keys have norms of the head's size.
    "235B-A22B": 2 * 151936 * 4096
    + 94 * (2 * 4096 * 8192 + 2 * 4096 * 512 + 128 * 3 * 4096 * 1536 + 128 * 4096 + 2 * 4096 + 2 * 128)
    + 4096,
}
HEAD = f"""\
How a reference in bfloat16 is put on cards: raydpo plan's arithmetic, GiB unless said otherwise.

W       bytes of all weights: 2 x the number of weights
N       cards that hold them together (score.partition); "host" = the weights are in the host's memory (score.offload)
W/N     weights on each card, with the small ones that every card keeps whole; 0 and the small ones for "host"
2G      twice the largest thing that is gathered at once: a decoder layer, the embedding or the head
A       MiB of a position in a pass that keeps nothing
t       positions that fit, in steps of 256, at most 65,536
At      A x t, or the head's chunk of logits if that is more
sum     W/N + 2G + At + {BASE_BYTES / GIB:.1f} for CUDA and NCCL; it must be at most {100 * USABLE:.0f} % of the card: \
{", ".join(f"{USABLE * card:.1f} of {card}" for card in CARDS)}
host    host memory that one machine needs: W and a tenth, for each team
gathers time of gathers over that of products with t positions: H100 at 45 % of 989 TFLOP/s, NVLink 350 GB/s, host 50 GB/s

16 cards are two machines of 8: a team is on one machine. Longest sequence 2,048 tokens. Not measured on a GPU.

"""
COLUMNS = "{:>10} {:>6} {:>6} {:>7} {:>8} {:>7} {:>6} {:>7} {:>8} {:>6} {:>7} {:>7} {:>8}  {}\n"
TITLES = ("model", "cards", "GiB", "W", "N", "W/N", "2G", "A", "t", "At", "sum", "host", "gathers", "verdict")


@functools.cache
def anatomy(model):
    return Anatomy.of(HERE / MODELS[model])


def choice(model, count, memory):
    per_position = {"8B": 7.0e9, "70B": 68.5e9, "123B": 121.8e9, "235B-A22B": 21.0e9, "405B": 401.7e9}[model]
    links = Links(name="NVLink", gather=350e9, host=50e9, seconds=2 * per_position / (0.45 * 989.4e12))
    room = ScoringRoom(name=f"{memory} GB", device_bytes=memory * GIB, per_machine=min(PER_MACHINE, count), links=links)
    return choose_partition(anatomy(model), ScoreConfig(workers=count), room, dtype="bfloat16", longest=2048)


def table():
    lines = [HEAD, COLUMNS.format(*TITLES)]
    for model in MODELS:
        for memory in CARDS:
            for count in COUNTS:
                found = choice(model, count, memory)
                size = f"{found.partition} host" if found.offload else str(found.partition)
                used = max(found.position_bytes * found.positions, found.logits_bytes)
                figures = [found.weights_bytes, found.gathered_bytes, used, found.total_at(found.positions)]
                weights, gathered, used, total = (f"{figure / GIB:.1f}" for figure in figures)
                host = f"{1.1 * found.host_bytes / GIB:.0f}" if found.offload else "-"
                gathers = "-" if found.simple else f"{100 * found.gather_share:.0f} %"
                teams = count // found.partition
                verdict = f"{teams} {'whole' if found.simple else 'team'}{'s' if teams > 1 and not found.simple else ''}"
                W, A = f"{found.model_bytes / GIB:.1f}", f"{found.position_bytes / 2**20:.3f}"
                row = [model, count, memory, W, size, weights, gathered, A, f"{found.positions:,}", used, total, host]
                lines.append(COLUMNS.format(*row, gathers, verdict))
        lines.append("\n")
    return "".join(lines).rstrip() + "\n"


def test_the_table_is_what_raydpo_plans():
    made = table()
    if os.environ.get("RAYDPO_WRITE_GOLDEN"):
        GOLDEN.write_text(made)
    assert made == GOLDEN.read_text(), "set RAYDPO_WRITE_GOLDEN=1 to write it anew, and check the arithmetic by hand"


def test_each_row_of_the_table_adds_up():
    """Read from the file alone, without the code that made it."""
    rows = [line.split() for line in GOLDEN.read_text().splitlines() if line.split()[:1] and line.split()[0] in MODELS]
    assert len(rows) == len(MODELS) * len(CARDS) * len(COUNTS)
    for row in rows:
        on_host = row[5] == "host"
        model, count, memory, size, *rest = row[0], *map(int, row[1:3]), int(row[4]), *row[5 + on_host :]
        weights, gathered, position, positions, used, total = (float(each.replace(",", "")) for each in rest[:6])
        whole = 2 * PARAMETERS[model] / GIB
        assert float(row[3]) == pytest.approx(whole, abs=0.06)
        assert weights == pytest.approx(0 if on_host else whole / size, abs=0.1)
        assert used == pytest.approx(position * positions / 1024, abs=0.06)
        assert total == pytest.approx(weights + gathered + used + 1.5, abs=0.2) and total <= 0.9 * memory + 0.05
        assert size <= 8 and count % size == 0


@pytest.mark.parametrize("model", MODELS)
def test_the_weights_are_counted_to_the_last_one(model):
    assert anatomy(model).parameters == PARAMETERS[model]
    assert choice(model, 8, 80).model_bytes == 2 * PARAMETERS[model]


@pytest.mark.parametrize(
    ("model", "count", "memory", "partition", "offload", "positions"),
    [
        ("8B", 1, 80, 1, None, 65_536),
        ("70B", 2, 80, 2, "cpu", 65_536),  # on the cards no position fits beside the weights
        ("70B", 8, 80, 4, None, 65_536),  # two teams
        ("70B", 2, 141, 2, None, 65_536),
        ("235B-A22B", 8, 80, 8, None, 16_384),
        ("235B-A22B", 16, 80, 8, None, 16_384),
        ("405B", 8, 80, 8, "cpu", 65_536),
        ("405B", 16, 80, 8, "cpu", 65_536),  # no team over machines
        ("405B", 8, 141, 8, None, 16_384),
    ],
)
def test_what_is_expected_of_the_plan(model, count, memory, partition, offload, positions):
    found = choice(model, count, memory)
    assert (found.partition, found.offload) == (partition, offload) and found.positions >= positions


def test_what_fits_nowhere_is_refused_with_what_would_do():
    wish = ScoreConfig(workers=2, offload=None)
    room = ScoringRoom(name="A100-40GB", device_bytes=40 * GIB, per_machine=2)
    with pytest.raises(ConfigError) as refused:
        choose_partition(anatomy("70B"), wish, room, dtype="bfloat16", longest=2048)
    said = str(refused.value)
    assert "takes 141.1 GB in bfloat16 and does not fit on 2 x A100-40GB (40.0 GiB) of one machine" in said
    assert "score.offload=cpu with 144.6 GiB of host memory" in said
    assert "8 such GPUs in one machine (score.workers a multiple of 8, score.partition=8)" in said
    assert "model.quantization=4bit" not in said  # 38 GiB
    roomier = ScoringRoom(name="L40S", device_bytes=48 * GIB, per_machine=2)
    with pytest.raises(ConfigError, match=r"or model\.quantization=4bit, which changes the log-probs"):
        choose_partition(anatomy("70B"), wish, roomier, dtype="bfloat16", longest=2048)
