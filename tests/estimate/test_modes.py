import pytest

from raydpo.config import LoraSettings, ModelConfig, TrainConfig, load_config
from raydpo.errors import ConfigError
from raydpo.estimate.cards import DEVICES, MEMORY
from raydpo.estimate.modes import Question, compare_modes
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.ledger import BASE_BYTES, ENOUGH, USABLE

GIB = 2**30


def ask(anatomy, memory, workers=8, budget=8192, longest=2000, model=None, **train):
    return compare_modes(
        Question(
            anatomy=anatomy,
            model=ModelConfig(path="m", **(model or {})),
            train=TrainConfig(workers=workers, **train),
            workers=workers,
            memory=memory * GIB,
            dtype="bfloat16",
            batch=Batch.of_pairs([(1000, 300, 500)]),
            longest=longest,
            budget=budget,
        ),
        "GPU",
    )


def test_workers_that_compute_together_share_the_longest_pair(llama):
    alone = ask(llama, 24, workers=64, budget=None, longest=400_000)
    assert alone.proposed is None and "Set train.sequence_parallel higher than 1" in " ".join(alone.lines())
    shared = ask(llama, 24, workers=64, budget=None, longest=400_000 // 64, sequence_parallel=64)
    assert shared.proposed is not None
    assert "longest pair: 400,000 positions, 6,250 of them for each of 64 workers" in shared.lines()[0]


def test_every_device_has_memory():
    assert MEMORY.keys() == DEVICES.keys()


def test_the_proposal_changes_as_memory_shrinks(llama):
    """Modes get slower from row to row, and the first that fits is proposed."""
    names = []
    for memory in (400, 141, 80, 48, 40, 30):
        modes = ask(llama, memory)
        names.append(modes.proposed.name)
        place = modes.rows.index(modes.proposed)
        assert not any(row.fits for row in modes.rows[:place])
        assert modes.proposed.total <= USABLE * memory * GIB
    assert names[0] == "ZeRO 0"
    assert len(set(names)) >= 4
    order = [row.name for row in ask(llama, 80).rows]
    assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)


def test_what_does_not_fit_is_said_not_to_fit(llama):
    """8B parameters on one GPU of 80 GiB: 16 GB of weights, and 96 GB of optimizer at 12 bytes per parameter."""
    modes = ask(llama, 80, workers=1, zero=0)
    configured = next(row for row in modes.rows if row.configured)
    assert configured.total > 16 * 8.03e9 and not configured.fits and configured.largest == 0
    assert any(line.startswith("does not fit: the configuration") for line in modes.lines())
    assert modes.proposed.host > 12 * 8.03e9  # only host memory helps
    assert "offload_optimizer=cpu" in modes.lines()[2]


def test_nothing_fits_and_how_many_would(llama):
    """With an optimizer that must stay in GPU memory (bitsandbytes)."""
    modes = ask(llama, 16, workers=2, optimizer="adamw_8bit")
    assert modes.proposed is None and modes.workers_needed > 2
    assert (
        "no mode that trains the same parameters fits on 2 x GPU of 16 GiB, bfloat16; "
        f"{modes.workers_needed:,} GPUs would be enough"
    ) in modes.lines()
    assert ask(llama, 16, workers=modes.workers_needed, optimizer="adamw_8bit").proposed is not None
    assert ask(llama, 16, workers=modes.workers_needed - 1, optimizer="adamw_8bit").proposed is None


def test_more_numbers_than_the_optimizer_counts_fit_nowhere(llama):
    """ZeRO 2 on two GPUs: 4.0e9 numbers a share, and bitsandbytes counts up to 2^31."""
    modes = ask(llama, 400, workers=2, optimizer="adamw_8bit")
    assert {row.name: row.fits for row in modes.rows if "recompute" not in row.name} == {
        "ZeRO 0": True, "ZeRO 1": False, "ZeRO 2": False, "ZeRO 3": True
    }  # fmt: skip
    assert any(
        line.startswith("the configuration is refused: train.optimizer adamw_8bit updates 4,015") for line in modes.lines()
    )
    assert not any(line.startswith("does not fit") for line in modes.lines())
    assert ask(llama, 400, workers=4, optimizer="adamw_8bit").refused is None


def test_no_number_of_gpus_helps_the_longest_pair(llama):
    modes = ask(llama, 24, longest=200_000)
    assert modes.proposed is None and modes.workers_needed is None
    assert any("more GPUs do not help" in line for line in modes.lines())
    assert any("200,000 positions, more than train.tokens_per_batch 8,192" in line for line in modes.lines())


def test_the_configured_mode_is_marked_and_proposed_where_it_is_the_fastest(llama):
    modes = ask(llama, 400, zero=0)
    assert [row.configured for row in modes.rows].count(True) == 1 and modes.rows[0].configured
    assert modes.proposed is modes.rows[0] and modes.proposed.overrides == ()
    assert "cheapest mode that fits: the configuration as it is" in modes.lines()
    unusual = ask(llama, 400, zero=1, offload_optimizer="cpu")
    assert [row.name for row in unusual.rows if row.configured] == ["ZeRO 1, optimizer on host"]


def test_overrides_can_be_pasted_and_lead_there(llama, tmp_path):
    modes = ask(llama, 48, zero=2)
    (tmp_path / "d.jsonl").touch()
    base = {"model": {"path": str(tmp_path)}, "data": {"train": str(tmp_path / "d.jsonl")}, "output": "o"}
    for row in modes.rows:
        train = load_config(base | {"train": {"zero": 2}}, row.overrides).train
        again = ask(llama, 48, **train.model_dump(exclude_unset=True))
        assert next(one for one in again.rows if one.configured).total == row.total


def test_full_training_stays_full_and_adapters_are_told_apart(llama):
    modes = ask(llama, 24)
    assert not any("lora" in setting for row in modes.rows for setting in row.overrides)
    lora, qlora = modes.adapters
    assert (lora.name, qlora.name) == ("LoRA", "QLoRA") and qlora.fits
    assert qlora.overrides[:2] == ("model.lora={r: 16}", "model.quantization=4bit")
    assert qlora.parts["weights"] < 16.06e9 / 2
    assert any(line.startswith("QLoRA, which trains adapters only: model.lora=") for line in modes.lines())


def test_adapters_stay_adapters(llama):
    modes = ask(llama, 80, model={"lora": LoraSettings(r=8)})
    assert [row.name for row in modes.adapters] == ["QLoRA"]
    quantized = ask(llama, 24, model={"lora": LoraSettings(r=8), "quantization": "4bit"})
    assert quantized.adapters == () and not any("ZeRO 3" in row.name for row in quantized.rows)


def test_a_single_worker_has_nobody_to_share_with(llama):
    assert [row.name for row in ask(llama, 141, workers=1, zero=0).rows][:2] == ["ZeRO 0", "ZeRO 0, recompute"]


def test_activations_on_the_host_need_no_partitioned_weights(llama):
    """A pair that is too long for one GPU fits when layer inputs are offloaded to the host, at any ZeRO stage."""
    quantized = {"lora": LoraSettings(r=16), "quantization": "4bit"}
    modes = ask(llama, 24, workers=1, budget=None, longest=24_000, model=quantized, zero=0)
    assert modes.proposed.overrides == ("train.gradient_checkpointing=true", "train.offload_activations=true")
    assert modes.proposed.name == "ZeRO 0, recompute, activations on host" and modes.workers_needed == 1
    assert modes.proposed.positions == 24_000, "the bytes are of the longest pair, which must fit"
    assert next(row for row in modes.rows if row.name == "ZeRO 0, recompute").largest == 0
    plain = ask(llama, 48, workers=1, budget=None, longest=40_000, model={"lora": LoraSettings(r=16)}, zero=0)
    assert plain.proposed.overrides == ("train.gradient_checkpointing=true", "train.offload_activations=true")


def test_quantized_weights_may_have_activations_and_optimizer_on_the_host(llama):
    """Quantized weights are never partitioned, so modes that need ZeRO 3 are not offered."""
    names = [row.name for row in ask(llama, 24, workers=1, model={"lora": LoraSettings(r=256), "quantization": "4bit"}).rows]
    assert "ZeRO 2, recompute, activations + optimizer on host" in names
    assert not any("ZeRO 3" in name for name in names)


def test_modes_that_refuse_overlapped_communication_are_planned_without(llama):
    rows = {row.name: row for row in ask(llama, 80, zero=2, overlap_communication=True).rows}
    assert rows.keys() == {row.name for row in ask(llama, 80, zero=2).rows}
    assert rows["ZeRO 3"].overrides == ("train.zero=3", "train.overlap_communication=false")


def test_the_largest_micro_batch_is_the_largest(llama):
    question = Question(
        anatomy=llama,
        model=ModelConfig(path="m"),
        train=TrainConfig(zero=3, gradient_checkpointing=True),
        workers=8,
        memory=80 * GIB,
        dtype="bfloat16",
        batch=Batch.of_pairs([(1000, 300, 500)]),
        longest=2000,
        budget=None,
    )
    row = next(row for row in compare_modes(question, "GPU").rows if row.configured)
    assert question.fits(row.largest) and (row.largest == 65536 or not question.fits(row.largest + 256))
    assert row.total == question.memory_at(row.positions).device + BASE_BYTES
    assert question.least == max(2000, ENOUGH)


def test_memory_out_of_range(llama):
    with pytest.raises(ConfigError, match="--memory is 0"):
        ask(llama, 0)
