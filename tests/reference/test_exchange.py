"""TRL's trainer on an exported file: it needs no reference model, and its first loss is ln 2."""

import math

import pytest
from kernel import counting, part_of, tokenised, with_reference
from tiny import make_tokenizer, preferences

from raydpo.config import DataConfig
from raydpo.errors import DataError
from raydpo.reference.exchange import completion_name, export_pairs, import_sums


def test_trl_trains_against_exported_values(tiny_llama, tmp_path):
    pytest.importorskip("trl")
    import pyarrow as pa
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    joined = with_reference(tokenised(preferences(8)), tiny_llama)
    for side in ("chosen", "rejected"):
        sums = [sum(row) for row in joined[f"ref_{side}_logps"].to_pylist()]
        joined = joined.append_column(f"ref_{side}_sum", pa.array(sums))
    decode = make_tokenizer().batch_decode
    assert export_pairs(joined, lambda ids: decode(ids, skip_special_tokens=False), tmp_path / "out.parquet") == 8

    class Trainer(DPOTrainer):
        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset

    dataset = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "datasets"))
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        precompute_ref_log_probs=True,
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        learning_rate=1e-3,
        max_length=512,
        save_strategy="no",
        disable_tqdm=True,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=settings,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[1] != pytest.approx(losses[0], abs=1e-3)


def test_the_name_of_a_completion():
    joined = tokenised(preferences(6))
    tables = [joined.slice(0, 4), joined.slice(4)]
    ids, keys = joined["pair_id"].to_pylist(), {side: joined[f"{side}_key"].to_pylist() for side in ("chosen", "rejected")}
    for side, of_side in keys.items():
        assert [completion_name(tables, key) for key in of_side] == [f"{one} {side}" for one in ids]
    assert completion_name(tables, bytes(16)) == "?"


def test_sums_are_not_imported_where_not_every_token_counts():
    pairs = counting(tokenised(preferences(3)), part_of)
    with pytest.raises(DataError, match=r"sums are over all tokens .* set data\.train_on=completion"):
        import_sums(DataConfig(train="a.jsonl"), pairs, None)
