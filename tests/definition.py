"""Log-probs by their definition: log softmax of the model's own logits, one sequence at a time."""

import numpy as np
import torch

from raydpo.model.layout import PromptGroup

VOCAB = 97


def groups(seed=0, shapes=((7, 5, 9), (30, 1, 2), (1, 12, 3), (16, 16, 16))):
    rng = np.random.default_rng(seed)
    return [
        PromptGroup(
            rng.integers(3, VOCAB, prompt).astype(np.int32),
            tuple(rng.integers(3, VOCAB, length).astype(np.int32) for length in lengths),
        )
        for prompt, *lengths in shapes
    ]


def by_definition(model, group, completion):
    ids = torch.from_numpy(np.concatenate([group.prompt, completion]).astype(np.int64))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(group.prompt) - 1 :, 0]
