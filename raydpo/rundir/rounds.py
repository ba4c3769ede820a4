"""Columns of the files in the directory of rounds, ``<output>/<name>``; ``directory`` has their names.

Stored rounds depend on these columns: they never change. The metadata of each file say what it was made from.
"""

from __future__ import annotations

import pyarrow as pa

__all__ = [
    "CUT",
    "GREEDY",
    "HELD_OUT_SCHEMA",
    "OUT",
    "PROMPT_SCHEMA",
    "ROUNDS_SCHEMA",
    "SAMPLE_SCHEMA",
    "SCORE_SCHEMA",
    "TRAIN",
]

TRAIN = "train"
"""Value of column ``split`` of a prompt to train on."""
OUT = "held_out"
"""Value of column ``split`` of a held-out prompt."""
GREEDY = -1
"""Value of column ``sample`` of a greedy answer."""
CUT = "length"
"""Value of column ``end`` of an answer that was cut at ``rounds.sample.max_tokens``."""

_IDS, _ID = pa.list_(pa.int32()), pa.binary(16)
PROMPT_SCHEMA = pa.schema(
    [
        ("prompt_id", _ID),  # digest of the token ids
        ("row", pa.int64()),  # number of the record in its source, from 1
        ("source", pa.string()),
        ("split", pa.string()),  # TRAIN or OUT
        ("prompt_ids", _IDS),
        ("prompt", pa.string()),  # text or messages, as JSON
        ("columns", pa.string()),  # the record's other columns, as a JSON object
    ]
)
"""A prompt: its tokens, its text, and the columns that reward functions get."""
SAMPLE_SCHEMA = pa.schema(
    [
        ("prompt_id", _ID),
        ("sample", pa.int32()),  # number among the answers to the prompt, from 0; or GREEDY
        ("round", pa.int32()),
        ("seed", pa.uint64()),  # with sample it selects the random numbers; see answers.draws
        ("answer_ids", _IDS),  # as sampled, with the token that ended it
        ("answer", pa.string()),  # the text that reward functions get: decoded, without the token that ended it
        ("end", pa.string()),  # stop, or CUT
        ("engine", pa.string()),
    ]
)
"""A sampled answer."""
SCORE_SCHEMA = pa.schema(
    [
        ("prompt_id", _ID),
        ("sample", pa.int32()),
        ("reward", pa.float64()),  # weighted sum, after rounds.cut; null = unknown
        ("parts", pa.map_(pa.string(), pa.float64())),  # value of each function; null = it does not apply, or failed
        ("error", pa.string()),  # what failed: "name: Type: message", one line for each function; null = nothing
        ("details", pa.string()),  # what functions said with log_extra, as a JSON object; null = nothing
        ("seconds", pa.float64()),
    ]
)
"""The reward of an answer."""
HELD_OUT_SCHEMA = pa.unify_schemas(
    [
        SAMPLE_SCHEMA,
        SCORE_SCHEMA,
        pa.schema(
            [
                ("log_ratio", pa.float64()),  # log policy - log initial model of a sampled answer, nats
                ("log_ratio_previous", pa.float64()),  # the same from the policy before the round
            ]
        ),
    ]
)
"""Samples, scores, and log-ratios of the policy. Log-ratios are null of greedy answers, and if samples are no samples of the
policy itself, since rounds.sample has a temperature other than 1 or a top_p below 1."""

_MAP = pa.map_(pa.string(), pa.float64())
ROUNDS_SCHEMA = pa.schema(
    [
        ("round", pa.int32()),
        ("policy", pa.string()),  # identity of the policy after the round
        ("reference", pa.string()),  # identity of the round's reference
        # the answers that the round trains on
        ("prompts", pa.int64()),
        ("answers", pa.int64()),
        ("reward", pa.float64()),  # mean over answers with a reward
        ("rewards", _MAP),  # mean of each function over the answers that it applies to
        ("success", pa.float64()),  # share of answers with a reward above rounds.measure.success, or of duels won
        ("any", pa.float64()),  # share of prompts with a success
        ("mixed", pa.float64()),  # share of prompts whose answers have different rewards
        ("ties", pa.int64()),  # prompts with two or more rewards, all the same
        ("errors", pa.int64()),  # answers on which a function failed
        ("unknown", pa.int64()),  # answers without a reward
        ("cut", pa.float64()),
        ("tokens", pa.float64()),  # mean length with the end token
        ("distinct", pa.float64()),  # share of different answers, mean over prompts
        ("entropy", pa.float64()),  # of the first token among the answers of a prompt, nats, mean over prompts
        ("pairs", pa.int64()),  # with replayed ones
        ("replayed", pa.int64()),
        ("wanted", pa.int64()),  # distinct completions whose reference log-probs are needed
        ("cache_hits", pa.int64()),  # those that the cache held
        ("steps", pa.int64()),
        ("first_loss", pa.float64()),
        ("last_loss", pa.float64()),
        ("chosen_log_ratio", pa.float64()),  # log policy - log reference of chosen completions in the last step, nats
        ("rejected_log_ratio", pa.float64()),
        # the answers to held-out prompts after the round
        ("eval_prompts", pa.int64()),
        ("eval_answers", pa.int64()),
        ("eval_reward", pa.float64()),
        ("eval_rewards", _MAP),
        ("eval_success", pa.float64()),
        ("eval_success_se", pa.float64()),  # standard error over prompts
        ("eval_success_greedy", pa.float64()),
        ("eval_any", pa.float64()),
        ("eval_errors", pa.int64()),  # of greedy answers, too
        ("eval_unknown", pa.int64()),  # sampled answers without a reward; they are no success
        ("eval_tokens", pa.float64()),
        ("eval_cut", pa.float64()),
        ("eval_distinct", pa.float64()),
        ("eval_entropy", pa.float64()),
        ("eval_drift_initial", pa.float64()),  # KL(policy || initial model), nats an answer
        ("eval_drift_initial_se", pa.float64()),
        ("eval_drift_previous", pa.float64()),  # the same from the policy before the round
        ("eval_drift_previous_se", pa.float64()),
        ("seconds", _MAP),  # by stage
    ]
)
"""The figures of a round. Null where there is none, such as of training in round 0."""
