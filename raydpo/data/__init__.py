"""Preferences: reading records of any format, tokenising them, and planning which of them make up a step."""

from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA, PairSets, load_pairs
from raydpo.data.preference import Malformed, Preference, normalise
from raydpo.data.records import Record, read_records
from raydpo.data.report import DataReport, SourceReport
from raydpo.data.show import render_pairs
from raydpo.data.tokenise import TokenisedPair, Tokeniser, load_tokenizer

__all__ = ["PAIR_SCHEMA", "DataReport", "Malformed", "PairSets", "Preference", "Record", "SourceReport", "TokenisedPair",
           "Tokeniser", "completion_key", "load_pairs", "load_tokenizer", "normalise", "read_records", "render_pairs"]
