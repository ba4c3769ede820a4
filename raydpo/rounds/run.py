"""``raydpo rounds``: in each round the policy answers prompts, reward functions score the answers, pairs of better and worse
ones are trained on, and the policy is measured on held-out prompts."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.session import session
from raydpo.cluster.waiting import request_nodes
from raydpo.config import Config
from raydpo.config.rounds import STAGES
from raydpo.errors import ConfigError, RaydpoError
from raydpo.pipeline.prepare import native_dtype, open_reference
from raydpo.reports.write import write_report
from raydpo.rounds.before import Checked, check_rounds
from raydpo.rounds.figures import held_out_figures, sampled_figures
from raydpo.rounds.goal import Goal
from raydpo.rounds.inputs import Inputs, reference_round
from raydpo.rounds.ledger import FILES, Ledger
from raydpo.rounds.measuring import measure, measure_settings
from raydpo.rounds.pairing import ROUND_PAIR_SCHEMA, make_pairs, no_pairs, with_replay
from raydpo.rounds.prompts import round_seed, slice_of
from raydpo.rounds.sampling import answer, sample_settings
from raydpo.rounds.scoring import reward_settings, score
from raydpo.rounds.stage import Made, content_digest, made_of, refusal, stage_table
from raydpo.rounds.table import print_rounds
from raydpo.rounds.training import Start, train_round
from raydpo.rundir.directory import CONFIG, FINAL, LEDGER, METRICS, PROMPTS, REPORT, RUN, SWEEP, TRAIN, round_folder
from raydpo.rundir.earlier import begin_again
from raydpo.rundir.records import read_rows
from raydpo.rundir.rounds import HELD_OUT_SCHEMA, PROMPT_SCHEMA, SAMPLE_SCHEMA, SCORE_SCHEMA
from raydpo.storage.files import Storage
from raydpo.storage.local_copy import RemoteDirectory
from raydpo.terminal.console import Console

__all__ = ["rounds"]

_SAMPLED = ("prompt_id", "sample", "answer_ids")
_SCORED = ("prompt_id", "sample", "reward")
