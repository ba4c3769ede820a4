"""The estimate is within 15 % of the measured peak: of the process on a CPU, of torch's allocator on a GPU."""

import pytest
import torch
from distributed import run_distributed
from footprint import ALLOCATOR, Case, model_with_vocabulary, peaks
from tiny import make_model

from raydpo.config import ModelConfig, TrainConfig
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.ledger import estimate_memory

TOLERANCE = 0.15
LORA = {"r": 16}
BF16 = "bfloat16"
OFFLOADED = {"zero": 3, "offload_optimizer": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models in float32: 26M parameters mostly in layers (100 MB), 53M mostly in the vocabulary (210 MB)."""
    place = tmp_path_factory.mktemp("models")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return {
        "deep": model_with_vocabulary(
            place / "deep", 2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, **heads
        ),
        "wide": model_with_vocabulary(
            place / "wide", 100_000, hidden_size=256, intermediate_size=704, num_hidden_layers=2, **heads
        ),
    }


def estimated(case, workers):
    """Bytes of the estimate; on a CPU, device and host share one memory."""
    prompt, completion = case.lengths
    batch = Batch.of_pairs([(prompt, completion, completion)], micro_batches=case.micro_batches)
    memory = estimate_memory(
        Anatomy.of(case.model),
        ModelConfig(path=str(case.model), lora=case.lora, **case.policy),
        TrainConfig(**case.train),
        batch,
        workers=workers,
        dtype=case.dtype,
        device=case.device,
    )
    return memory.together if case.device == "cpu" else memory.device


def compare(settings, workers, models, scratch, monkeypatch):
    for name, value in ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    cases = [Case(model=models[name], **{"tokens": 128} | setting) for name, setting in settings]
    # The C library reads ALLOCATOR when a process starts, so the ranks cannot be forked from one that runs.
    small = make_model(scratch / "small")
    ranks = run_distributed(peaks, workers, scratch, cases, small, scratch / "s", fresh=True)
    measured = [max(found) for found in zip(*ranks, strict=True)]
    report = []
    for (name, setting), case, found in zip(settings, cases, measured, strict=True):
        wanted = estimated(case, workers)
        report.append(
            (f"{name} on {workers}, {setting}: {wanted / 1e6:.0f} MB estimated, {found / 1e6:.0f} measured", wanted / found)
        )
    for line, ratio in report:
        print(f"{line}, {ratio:.3f}")
    wrong = [line for line, ratio in report if abs(ratio - 1) > TOLERANCE]
    assert not wrong, wrong


def test_the_default_modes(models, tmp_path, monkeypatch):
    """ZeRO 2 with a model of mostly layers; adapters, where activations dominate."""
    compare([("deep", {}), ("deep", {"tokens": 512, "lora": LORA})], 1, models, tmp_path, monkeypatch)


@pytest.mark.slow
def test_two_ranks(models, tmp_path, monkeypatch):
    compare([("deep", {"train": {"zero": 3}})], 2, models, tmp_path, monkeypatch)


SLOW = {
    "ZeRO on one rank": (1, [("deep", {"train": {"zero": zero}}) for zero in (0, 1, 3)]),
    "ZeRO with a vocabulary": (1, [("wide", {"train": {"zero": zero}}) for zero in (0, 2, 3)]),
    "ZeRO on two ranks": (2, [("deep", {"train": {"zero": zero}}) for zero in (0, 1, 2)]),
    "activations": (1, [("deep", {"tokens": 1024, "micro_batches": 1}), ("deep", {"tokens": 1024, "lora": LORA})]),
    "a vocabulary on two ranks": (2, [("wide", {}), ("wide", {"train": {"zero": 3}})]),
    "bfloat16": (1, [("deep", {"dtype": BF16, "tokens": 256}), ("wide", {"dtype": BF16, "tokens": 32})]),
    "ZeRO in bfloat16": (1, [("deep", {"dtype": BF16, "tokens": 32, "train": {"zero": zero}}) for zero in (0, 1, 3)]),
    "bfloat16 on two ranks": (2, [("deep", {"dtype": BF16, "tokens": 32, "train": {"zero": zero}}) for zero in range(4)]),
    # Adapters need almost no optimizer memory, so activations dominate.
    "recomputing": (
        1,
        [("deep", {"tokens": tokens, "lora": LORA, "train": {"gradient_checkpointing": True}}) for tokens in (512, 1536)],
    ),
    "adapters": (
        1,
        [
            ("deep", {"tokens": 512, "lora": LORA, "policy": {"quantization": "4bit"}}),
            ("deep", {"tokens": 512, "lora": LORA, "train": {"zero": 3}}),
        ],
    ),
    "bfloat16 moments": (1, [(name, {"train": {"optimizer_states": BF16}}) for name in ("deep", "wide")]),
    "offload": (1, [("deep", {"train": {"offload_optimizer": "cpu"}})]),
    "offload on two ranks": (2, [("deep", {"train": OFFLOADED | more}) for more in ({}, {"offload_params": "cpu"})]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_all_modes(kind, models, tmp_path, monkeypatch):
    workers, settings = SLOW[kind]
    compare(settings, workers, models, tmp_path, monkeypatch)


LONG = {"dtype": BF16, "tokens": 16384, "micro_batches": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"dtype": BF16},
        LONG,
        LONG | {"train": {"gradient_checkpointing": True}},
        LONG | {"lora": LORA},
        LONG | {"lora": LORA, "policy": {"quantization": "4bit"}},
        {"dtype": BF16, "train": {"zero": 0}},
        {"dtype": BF16, "train": {"zero": 3}},
        {"dtype": BF16, "train": {"optimizer": "adamw_8bit"}},
    ],
    ids=str,
)
def test_on_a_gpu(setting, models, tmp_path):
    """Peak bytes of torch's allocator; host memory is not measured."""
    case = Case(model=models["deep"], device="cuda", **{"tokens": 1024} | setting)
    ((found,),) = run_distributed(peaks, 1, tmp_path, [case], make_model(tmp_path / "small"), tmp_path / "s")
    assert estimated(case, 1) == pytest.approx(found, rel=TOLERANCE)
