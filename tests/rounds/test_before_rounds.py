"""What is refused before Ray is started, given the files of earlier commands."""

import io
import re

import pytest
from small import small_rounds
from tiny import make_model

from raydpo.config import load_config
from raydpo.errors import ConfigError, FilesError
from raydpo.rounds.before import check_inputs, prompts_made, refuse_changes
from raydpo.rounds.ledger import Ledger
from raydpo.rounds.measuring import measure_settings
from raydpo.rounds.run import rounds
from raydpo.rounds.sampling import sample_settings
from raydpo.rounds.stage import Content, Made, stage_table
from raydpo.rundir.rounds import HELD_OUT_SCHEMA, PROMPT_SCHEMA, SAMPLE_SCHEMA
from raydpo.terminal.console import Console

REGEX = [{"use": "regex", "pattern": "a"}]


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def file(tmp_path, tiny_llama):
    return small_rounds(tmp_path, tiny_llama, rewards=REGEX)


def inputs_of(file, *overrides):
    return check_inputs(load_config(file, overrides), Console(io.StringIO()))


def store(inputs, stage, number, name, settings, schema, **digests):
    """Store an empty file of a stage, made with these inputs."""
    made = Made(stage=stage, number=number, settings=settings, inputs=digests)
    stage_table(inputs.storage, name, made, schema, lambda: Content(schema.empty_table()))


def measured(inputs):
    """Store the prompts and the measurement before the first round, which is over."""
    stage_table(inputs.storage, "prompts.parquet", prompts_made(inputs), PROMPT_SCHEMA, lambda: Content(inputs.prompts))
    digest = inputs.policy(0).identity.digest
    name = "round-000/held_out.parquet"
    store(inputs, "measure", 0, name, measure_settings(inputs), HELD_OUT_SCHEMA, **{"initial policy": digest})
    Ledger(inputs.config).end_round(0, {"round": 0, "eval_success": 0.5}, {})
    return digest


def test_a_measurement_of_another_model_is_made_again_until_one_is_trained(file, other_llama):
    measured(inputs_of(file))
    same, other = inputs_of(file), inputs_of(file, f"model.path={other_llama}")
    ledger = Ledger(same.config)
    refuse_changes(same, ledger)
    assert ledger.over(0)
    refuse_changes(other, ledger)
    assert not ledger.over(0), "its figures are of the model before"
    same.storage.write("round-001/train/run.json", b"{}")
    with pytest.raises(ConfigError, match=r"model.path .* has changed \(round-000/held_out.parquet\)"):
        refuse_changes(other, Ledger(other.config))
    refuse_changes(same, Ledger(same.config))


def test_samples_of_another_model_are_refused(file, other_llama):
    inputs = inputs_of(file)
    digest = measured(inputs)
    store(inputs, "sample", 1, "round-001/samples.parquet", sample_settings(inputs), SAMPLE_SCHEMA, policy=digest)
    store(inputs, "sample", 2, "round-002/samples.parquet", sample_settings(inputs), SAMPLE_SCHEMA, policy="ab" * 16)
    refuse_changes(inputs, Ledger(inputs.config))  # round 2 was sampled from the policy of round 1
    other = inputs_of(file, f"model.path={other_llama}")
    with pytest.raises(ConfigError, match=r"model.path .* has changed \(round-001/samples.parquet\)"):
        refuse_changes(other, Ledger(other.config))


def test_other_prompts_are_refused_without_the_file_of_prompts(file, tmp_path):
    inputs = inputs_of(file)
    measured(inputs)
    digests = {"policy": inputs.policy(0).identity.digest, "prompts": inputs.prompts_digest}
    store(inputs, "sample", 1, "round-001/samples.parquet", sample_settings(inputs), SAMPLE_SCHEMA, **digests)
    inputs.storage.delete("prompts.parquet")
    refuse_changes(inputs, Ledger(inputs.config))
    with open(tmp_path / "prompts.jsonl", "a") as prompts:
        prompts.write('{"prompt": "another one:", "number": 99}\n')
    other = inputs_of(file)
    with pytest.raises(ConfigError, match=r"rounds.prompts and rounds.held_out \(content\) .*\(round-001/samples.parquet\)"):
        refuse_changes(other, Ledger(other.config))


def test_a_directory_in_place_of_final_is_refused(file, tmp_path):
    """A copy that follows links has the policy there once more."""
    inputs = inputs_of(file)
    (tmp_path / "runs/small/final").mkdir(parents=True)
    with pytest.raises(FilesError, match=r"runs/small/final is a directory, but rounds keep a link"):
        refuse_changes(inputs, Ledger(inputs.config))
    (tmp_path / "runs/small/final").rmdir()
    (tmp_path / "runs/small/final").symlink_to(tmp_path)
    refuse_changes(inputs, Ledger(inputs.config))


def test_fresh_renames_nothing_for_a_command_that_is_refused(file, tmp_path, other_llama):
    (tmp_path / "runs/small").mkdir(parents=True)
    (tmp_path / "runs/small/rounds.json").write_text("{}")
    config = load_config(file, ["rounds.reference=previous", f"reference.path={other_llama}"])
    with pytest.raises(ConfigError, match="section reference names"):
        rounds(config, Console(io.StringIO()), fresh=True)
    assert [place.name for place in (tmp_path / "runs").iterdir()] == ["small"]


@pytest.mark.parametrize("key", ["rounds.sample.seed", "train.seed", "evaluate.seed"])
def test_a_seed_that_no_generator_takes_is_refused(key, file):
    for seed in (2**63, 10**30):
        with pytest.raises(ConfigError, match=rf"'{key}' is {seed}, expected less than {2**63}"):
            load_config(file, [f"{key}={seed}"])


def test_rewards_that_no_answer_can_be_right_by_are_refused(file):
    weighted = "rounds.rewards=[{use: regex, pattern: a, weight: 0.5}, {use: regex, pattern: b, weight: 0, name: b}]"
    with pytest.raises(ConfigError, match=r"the rewards add up to 0.5 at most .* rounds.measure.success \(0.5\); lower"):
        inputs_of(file, weighted)
    inputs_of(file, weighted, "rounds.measure.success=0.4")


def test_replicas_of_more_gpus_than_workers_are_refused(file):
    with pytest.raises(ConfigError, match=r"tensor_parallel 4 needs as many GPUs, but score.workers is 2; raise"):
        inputs_of(file, "rounds.sample.engine=ray", "rounds.sample.tensor_parallel=4", "score.workers=2")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["rounds.held_out=0.06"], "only [1-4] held-out prompts are measured, .* raise rounds.held_out.fraction"),
        (["rounds.held_out={path: few.jsonl}"], "only 2 held-out prompts .* add prompts to rounds.held_out.path"),
        (["rounds.measure.prompts=2"], "only 2 held-out prompts are measured, .* raise rounds.measure.prompts"),
        (["rounds.per_round=99"], "but there are [0-9]+ prompts to train on: each round samples all of them, with new"),
        (["rounds.per_round=99", "rounds.offline=true"], "prompts to train on: the first round samples all of them$"),
    ],
)
def test_what_is_told_of_few_prompts_fits_the_settings(settings, told, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"prompt": "one:", "number": 1}\n{"prompt": "two:", "number": 2}\n')
    stream = io.StringIO()
    check_inputs(load_config(file, settings), Console(stream))
    assert re.search(told, stream.getvalue(), re.MULTILINE), stream.getvalue()


def test_prompts_without_what_a_reward_reads_are_told_or_refused(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.jsonl").write_text("".join(f'{{"prompt": "out {row}:", "other": 1}}\n' for row in range(6)))
    stream, out = io.StringIO(), "rounds.held_out={path: out.jsonl}"
    pytest.importorskip("math_verify")
    with pytest.raises(
        ConfigError, match=r"no held-out prompt has a value in 'number', which .*; add it, or write number=None"
    ):
        inputs_of(file, out, "rounds.rewards=small_rewards:all_but_one_right")
    with open(tmp_path / "small_rewards.py", "a") as module:
        module.write("\n\ndef optional(completion_ids, number=None, **columns):\n    return [1.0] * len(completion_ids)\n")
    uses = "small_rewards:optional, {use: json, column: number, weight: 0}"
    check_inputs(load_config(file, [out, f"rounds.rewards=[{uses}]", "rounds.max_errors=1"]), Console(stream))
    said = stream.getvalue()
    assert (
        "no held-out prompt has a value in 'number', which the reward json reads" in said
        and "number', which the reward optional" in said
        and "no training" not in said
    )
    assert re.search(r"the reward json cannot read 'number' of 40 of 40 training prompt\(s\) \(first: record ", said)
    with pytest.raises(ConfigError, match=r"'number' of 31 of 31 training prompt\(s\) .* is a int; .* remove these prompts"):
        inputs_of(file, "rounds.rewards=[{use: json, column: number}]")
    with pytest.raises(
        ConfigError,
        match=r"no reward with a weight applies to any of 6 held-out prompt\(s\), such as record [1-6] of held-out",
    ):
        inputs_of(file, out, "rounds.rewards=[{use: math, column: number}]")
