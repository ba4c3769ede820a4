"""The token ids are the same as those that TRL's DPOTrainer and KTOTrainer prepare."""

from types import SimpleNamespace

import pytest

from raydpo.data.preference import normalise

U, A, S = "user", "assistant", "system"


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


TEXT = [
    {"prompt": "what colour is the sky?", "chosen": " the sky is blue", "rejected": " grass is green</s>"},
    {"prompt": "the a", "chosen": "b ab", "rejected": "b aba"},
    {"prompt": "the answer is", "chosen": " four\n\n", "rejected": " five \u20ac"},
]
CHAT = [
    {"prompt": chat((U, "what colour?")), "chosen": chat((A, "blue")), "rejected": chat((A, "green"))},
    {
        "prompt": chat((S, "Be rude."), (U, "a"), (A, "b"), (U, "c")),
        "chosen": chat((A, "the sky")),
        "rejected": chat((A, "the sky is")),
    },
]
IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHAT]
EXTRAS = [row | {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"thinking": False}} for row in CHAT]


def unpaired(rows):
    """Both completions of each row by themselves, with labels."""
    return [
        {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        | {"completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("rows", [TEXT, CHAT, EXTRAS], ids=["text", "chat", "extras"])
def test_same_ids_of_completions_alone_as_trl(tokeniser, rows):
    pytest.importorskip("trl")
    from accelerate import PartialState
    from datasets import Dataset
    from trl.trainer.kto_trainer import KTOTrainer

    PartialState(cpu=True)
    tokenizer, rows = tokeniser.tokenizer, unpaired(rows)
    settings = SimpleNamespace(dataset_num_proc=None, max_length=1024)
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    theirs = KTOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, settings, "train")
    preferences = [preference for row in rows for preference in normalise(row)]
    ours = [
        (pair.prompt, pair.chosen if preference.alone == "chosen" else pair.rejected, preference.alone == "chosen")
        for preference, pair in zip(preferences, tokeniser.encode(preferences), strict=True)
    ]
    assert [(prompt.tolist(), completion.tolist(), label) for prompt, completion, label in ours] == [
        (row["prompt_ids"], row["completion_ids"], row["label"]) for row in theirs
    ]


@pytest.mark.parametrize("rows", [TEXT, CHAT, IMPLICIT, EXTRAS], ids=["text", "chat", "implicit", "extras"])
def test_same_ids_as_trl(tokeniser, rows):
    pytest.importorskip("trl")
    from accelerate import PartialState
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer

    PartialState(cpu=True)
    tokenizer = tokeniser.tokenizer
    settings = SimpleNamespace(dataset_num_proc=None, max_length=1024, truncation_mode="keep_start")
    theirs = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, settings, "train"
    )
    ours = tokeniser.encode([preference for row in rows for preference in normalise(row)])
    assert [[ids.tolist() for ids in pair] for pair in ours] == [
        [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in theirs
    ]
