"""Imports of the ranks of tests/distributed.py before they start. Nothing here computes or starts a thread pool."""

import sys

import numpy
import peft
import pyarrow.parquet
import torch.distributed
import transformers.integrations.deepspeed
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3

import raydpo.reference.score
import raydpo.training.export
import raydpo.training.trainer

sys.modules["mlflow"] = None  # as in engine.join_process_group
import deepspeed  # noqa: E402

del sys.modules["mlflow"]

__all__ = ["deepspeed", "numpy", "peft", "pyarrow", "raydpo", "torch", "transformers"]
