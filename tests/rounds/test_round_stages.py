"""The stages of a round on answers that are given: what they read, and what they say. No Ray."""

import io
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from round_tables import STOP, answered, config, prompts

from raydpo.cluster.resources import Resources
from raydpo.rounds import measuring, sampling
from raydpo.rounds import round as stages
from raydpo.rounds.figures import held_out_figures
from raydpo.rounds.inputs import Inputs
from raydpo.rounds.ledger import Ledger
from raydpo.rounds.pairing import final_rewards
from raydpo.rounds.round import Round
from raydpo.rounds.scoring import score
from raydpo.rounds.stage import Content
from raydpo.terminal.console import Console

TABLE = prompts(12, held_out=4)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Rounds whose policies and rewards are made up: in each round one of two answers to each prompt is right."""

    def begin(**rounds):
        stream, made = io.StringIO(), config(tmp_path / "prompts.jsonl", per_round=8, count=9, **rounds)
        made = made.model_copy(update={"output": str(tmp_path)})
        inputs = SimpleNamespace(
            config=made,
            console=Console(stream),
            rounds=made.rounds,
            storage=Ledger(made).storage,
            tokeniser=SimpleNamespace(stop_ids=(STOP,)),
            prompts=TABLE,
            prompts_digest="ab" * 16,
            reward_settings={},
            policy=lambda number: SimpleNamespace(identity=SimpleNamespace(digest=f"{number:032x}")),
        )

        def of_round(number):
            return answered(
                TABLE, {row: [(1.0, [number, row, STOP]), (0.0, [number, 99, STOP])] for row in range(8)}, number
            )

        def score(inputs, samples, *, number, step):
            return Content(final_rewards(samples, of_round(number)[1], made.rounds))

        monkeypatch.setattr(stages, "answer", lambda *given, number: (of_round(number)[0], 0.0))
        monkeypatch.setattr(stages, "score", score)
        return inputs, stream

    return begin


def paired(inputs, number):
    one = Round(inputs, Ledger(inputs.config), number)
    for stage in ("sample", "score", "pair"):
        assert one.stage(stage) is None
    return one.figures


def test_replay_reads_each_earlier_round_once(begun, monkeypatch):
    inputs, stream = begun(replay=0.5)
    for number in range(1, 8):
        figures = paired(inputs, number)
        assert (figures["pairs"], figures["replayed"]) == (8 if number == 1 else 16, 0 if number == 1 else 8)
    read, table = [], stages.stage_table
    monkeypatch.setattr(
        stages,
        "stage_table",
        lambda storage, name, *given, **more: read.append(name) or table(storage, name, *given, **more),
    )
    stream.truncate(0)
    paired(inputs, 8)
    assert len(read) == len(set(read)) == 3 * 8
    assert "round 8: 16 answers" in stream.getvalue() and "round 7:" not in stream.getvalue(), "each was told in its turn"


def of_two_tasks(tmp_path, sums):
    """Prompts of which ``sums`` have a column ``answer``, and inputs with the reward ``math``, which reads it."""
    texts = ['{"answer": "4"}' if place in sums else '{"kind": "poem"}' for place in range(len(TABLE))]
    table = TABLE.set_column(TABLE.column_names.index("columns"), "columns", pa.array(texts))
    stream, made = io.StringIO(), config(tmp_path / "prompts.jsonl", sample={"temperature": 0.5}, measure={"n": 2})
    made = made.model_copy(update={"output": str(tmp_path)})
    return Inputs(made, Console(stream), None, table), stream


def test_a_round_without_the_prompts_of_a_task_has_no_rewards_of_it_and_no_errors(tmp_path):
    inputs, _ = of_two_tasks(tmp_path, sums=[0])
    samples, _ = answered(TABLE, {row: [(None, [4, STOP])] for row in (1, 2, 8)})
    content = score(inputs, samples, number=1, step=0)
    assert content.failed is None
    assert content.table["error"].to_pylist() == content.table["reward"].to_pylist() == [None] * 3
    samples, _ = answered(TABLE, {row: [(None, [4, STOP])] for row in (0, 1)})
    assert score(inputs, samples, number=1, step=0).table["reward"].to_pylist() == [1.0, None]


@pytest.mark.parametrize(("sums", "warned"), [([0, 1], True), ([0, 9], False)])
def test_held_out_prompts_to_which_no_reward_applies_are_told(tmp_path, monkeypatch, sums, warned):
    inputs, stream = of_two_tasks(tmp_path, sums)
    samples, _ = answered(TABLE, {row: [(None, [4, STOP])] * 2 for row in range(8, 12)}, number=0)
    monkeypatch.setattr(Inputs, "policy", lambda inputs, number: None)
    monkeypatch.setattr(measuring, "answer", lambda *given, **more: (samples, 0.0))
    content = measuring.measure(inputs, 0, step=0, ahead=False)
    assert held_out_figures(content.table, inputs.rounds)["eval_success"] == (0.0 if warned else 0.25)
    assert ("round 0: no answer to a held-out prompt has a reward" in stream.getvalue()) is warned


def test_each_worker_of_a_team_samples_ahead_by_itself(tmp_path, monkeypatch):
    """Four workers that score in teams of four take 40 seconds of work in 10."""
    inputs, _ = of_two_tasks(tmp_path, sums=[0])
    asked = sampling.Asked(np.arange(2), 1, 7)

    def work(self, task, tables, doing, blocks, spent):
        spent(0, 99.0)
        for _ in range(4):
            spent(1, 10.0)
        return [pa.table({"answer_ids": [[5, STOP]] * len(one)}) for one in tables]

    monkeypatch.setattr(Inputs, "work", work)
    monkeypatch.setattr(sampling, "pick_engine", lambda *given: ("transformers", "engine"))
    monkeypatch.setattr(sampling, "sampling", lambda *given: SimpleNamespace(stop=[STOP], engine="transformers"))
    monkeypatch.setattr(sampling, "resources_for", lambda *given: Resources(4, 0, 1, sequence=4))
    tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [str(one) for one in ids])
    inputs = Inputs(inputs.config, inputs.console, SimpleNamespace(stop_ids=[STOP], tokenizer=tokenizer), TABLE)
    samples, ahead = sampling.answer(inputs, None, asked, number=0, following=asked)
    assert samples["answer"].to_pylist() == ["[5]", "[5]"] and ahead == 10.0
