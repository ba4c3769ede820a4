"""Imports of the ranks of tests/distributed.py before they start. Nothing here computes or starts a thread pool."""

import importlib
import sys

import numpy
import pandas
import peft
import pyarrow.parquet
import torch.distributed
import transformers.integrations.deepspeed
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import raydpo.reference.score
import raydpo.training.policy.export
import raydpo.training.trainer

sys.modules["mlflow"] = None  # as in partition.join_process_group
import deepspeed  # noqa: E402

del sys.modules["mlflow"]

# Imported or built at first use, half of the CPU seconds of a short training: pandas by pyarrow's to_numpy, Muon by
# deepspeed.initialize, the names of other models' weights by from_pretrained.
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
get_checkpoint_conversion_mapping("llama")

__all__ = ["deepspeed", "numpy", "pandas", "peft", "pyarrow", "raydpo", "torch", "transformers"]
